"""The optimizer interface.

Constructing a torch.optim.Optimizer imports torch's compiler, which takes seconds (figures in
docs/log.md). The fused kernels of torch.optim only need lists of tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Optimizer(ABC):
    """Parameter groups and per-parameter state, with torch.optim's names.

    Args:
        param_groups: dicts with the parameters under "params" and the settings that they share. The
            learning rate, "lr", is set before each step, to a multiple "lr_scale" of the step's.
    """

    found_inf: Tensor | None = None
    """Set before a step, which is skipped on the device if this is above zero."""
    # Tells torch.amp.GradScaler that `step` reads `found_inf`, so that the scaler need not wait for
    # the device. The scaler also sets `grad_scale`: None, since gradients are unscaled before.
    _step_supports_amp_scaling = True

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [{"lr": 0.0, "lr_scale": 1.0, **group} for group in param_groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._is_initialized = False

    def set_lr(self, lr: float | Tensor) -> None:
        """Set the learning rate of all groups for the next step."""
        for group in self.param_groups:
            group["lr"] = lr if group["lr_scale"] == 1 else lr * group["lr_scale"]

    def zero_grad(self) -> None:
        """Free all gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def init_state(self) -> None:
        """Allocate the state of all parameters; otherwise the first step does so."""
        if self._is_initialized:
            # Called in every step: looking up all parameters takes as long as a kernel launch.
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = self.new_state(parameter)
        self._is_initialized = True

    @abstractmethod
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """Allocate the state of a parameter."""

    @abstractmethod
    def step(self) -> None:
        """Update the parameters that have a gradient."""
