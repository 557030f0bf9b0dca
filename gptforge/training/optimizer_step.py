"""The end of a step: unscale and clip the gradients, and update the weights."""

from typing import cast

import torch
from torch import Tensor

from gptforge.optim.ema import WeightEMA
from gptforge.optim.optimizer import Optimizer
from gptforge.training.backends.autograd import AutogradBackend
from gptforge.training.backends.manual import ManualBackend


class OptimizerStep:
    """Unscales and clips the gradients, updates the weights, and frees the gradients.

    Args:
        optimizer: its learning rate is set.
        backend: computed the gradients.
        scaler: loss scaler for fp16; may be disabled.
        ema: average of the weights to update, if any.
        max_norm: maximum gradient norm; infinite for no clipping.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        backend: AutogradBackend | ManualBackend,
        scaler: torch.amp.GradScaler,
        ema: WeightEMA | None,
        max_norm: float,
    ) -> None:
        self._optimizer, self._backend, self._scaler = optimizer, backend, scaler
        self._ema, self._max_norm = ema, max_norm

    def __call__(self, lr: float | Tensor, loss: Tensor) -> Tensor:
        """Make the update; returns the gradient norm before clipping, on the device.

        If the norm or the loss is not finite, weights and optimizer state stay unchanged; this is
        decided on the device, without a sync.

        Args:
            lr: learning rate. As an fp32 scalar on the device it may change between replays of a
                CUDA graph.
            loss: of this step; NaN if the gradients of a rank are incomplete.
        """
        optimizer, scaler = self._optimizer, self._scaler
        # The scaler is typed for torch.optim, but only uses what our base class has.
        torch_optimizer = cast(torch.optim.Optimizer, optimizer)
        scaler.unscale_(torch_optimizer)
        norm = self._backend.clip_grad_norm_(self._max_norm)
        optimizer.set_lr(lr)
        if not scaler.is_enabled():
            # 0 * x is NaN iff x is NaN or Inf, and NaN != 0: two kernels instead of isfinite's
            # seven. An enabled scaler sets this flag instead.
            optimizer.found_inf = (norm + loss).mul_(0).ne_(0)
        # The optimizers read found_inf on the device, where `if norm.isfinite()` would sync.
        scaler.step(torch_optimizer)
        scaler.update()
        if self._ema is not None:
            self._ema.update()
        optimizer.zero_grad()
        return norm
