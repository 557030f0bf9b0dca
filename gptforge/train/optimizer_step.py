"""What ends an update: gradients are clipped, and weights moved."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from gptforge.optim.optimizer import Optimizer

Clip = Callable[[float], Tensor]
"""Shortens the gradients if their norm is above a number; gives the norm before that."""


class OptimizerStep:
    """An optimizer with clipping, a loss scaler where one is needed, and an eye on bad updates.

    Args:
        optimizer: its learning rate is set at each update.
        grad_clip: longest gradient norm let through; 0 lets all through.
        scaler: of the losses, if it is enabled.
    """

    def __init__(
        self, optimizer: Optimizer, *, grad_clip: float, scaler: torch.amp.GradScaler
    ) -> None:
        self._optimizer = optimizer
        self._grad_clip = grad_clip if grad_clip > 0 else float("inf")
        self._scaler = scaler

    def __call__(self, clip: Clip, loss: Tensor, lr: float | Tensor) -> Tensor:
        """Move the weights by their gradients; the gradients' norm before clipping.

        A rate that is a float32 scalar on the device may change when a recording is played back.
        If norm or loss is not finite, weights and moments stay as they are.
        """
        # The scaler wants an optimizer of torch's, and uses no more than ours has.
        optimizer = cast(torch.optim.Optimizer, self._optimizer)
        self._scaler.unscale_(optimizer)
        norm = clip(self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not self._scaler.is_enabled():
            # The optimizer looks for this flag, on the device, before it moves a weight; the scaler
            # sets it by itself.
            # A loss that is no number is the word of a rank whose gradients are not whole.
            # Nought times it is no number then, and not nought: few kernels, for small models.
            self._optimizer.found_inf = (norm + loss).mul_(0).ne_(0)
        self._scaler.step(optimizer)
        self._scaler.update()
        return norm

    def scaler_state_dict(self) -> dict[str, float]:
        """The loss scaler's state; empty where there is none."""
        return {name: float(value) for name, value in self._scaler.state_dict().items()}

    def load_scaler_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with a saved scale."""
        if state and self._scaler.is_enabled():
            whole = {"growth_interval", "_growth_tracker"}
            self._scaler.load_state_dict(
                {name: int(value) if name in whole else value for name, value in state.items()}
            )
