"""The end of a step: unscale and clip the gradients, and update the weights."""

from typing import cast

import torch
from torch import Tensor

from gptforge.optim.ema import WeightEMA
from gptforge.optim.optimizer import Optimizer
from gptforge.train.backends.autograd import AutogradBackend
from gptforge.train.backends.manual import ManualBackend


class OptimizerStep:
    """Unscales and clips gradients, updates the weights, and skips steps with NaN or Inf.

    Args:
        optimizer: its learning rate is set at each step.
        backend: computed the gradients.
        grad_clip: maximum gradient norm; 0 disables clipping.
        scaler: loss scaler for fp16; may be disabled.
        ema: average of the weights to update, if any.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        backend: AutogradBackend | ManualBackend,
        *,
        grad_clip: float,
        scaler: torch.amp.GradScaler,
        ema: WeightEMA | None = None,
    ) -> None:
        self._optimizer, self._backend, self._scaler = optimizer, backend, scaler
        self.ema = ema
        # With an infinite maximum the norm is still computed: it is logged, and checked below.
        self._max_norm = grad_clip if grad_clip > 0 else float("inf")

    def __call__(self, lr: float | Tensor, loss: Tensor) -> Tensor:
        """Update the weights, and free the gradients.

        If the gradient norm or the loss is not finite, weights and optimizer state stay unchanged;
        this is decided on the device, without a sync.

        Args:
            lr: learning rate. As an fp32 scalar on the device it may change between replays of a
                CUDA graph.
            loss: of this step; NaN if the gradients of a rank are incomplete.

        Returns:
            The gradient norm before clipping, on the device.
        """
        # The scaler is typed for torch.optim, but only uses what our base class has.
        optimizer = cast(torch.optim.Optimizer, self._optimizer)
        self._scaler.unscale_(optimizer)
        norm = self._backend.clip_grad_norm_(self._max_norm)
        self._optimizer.set_lr(lr)
        if not self._scaler.is_enabled():
            # 0 * x is NaN iff x is NaN or Inf, and NaN != 0: two kernels instead of isfinite's
            # seven. An enabled scaler sets this flag instead.
            self._optimizer.found_inf = (norm + loss).mul_(0).ne_(0)
        # The optimizers read found_inf on the device, where `if norm.isfinite()` would sync.
        self._scaler.step(optimizer)
        self._scaler.update()
        if self.ema is not None:
            self.ema.update()
        self._optimizer.zero_grad()
        return norm
