"""The end of a step: unscale and clip the gradients, and update the weights."""

from typing import cast

import torch
from torch import Tensor

from gptforge.optim.ema import WeightEMA
from gptforge.optim.optimizer import Optimizer
from gptforge.training.backends.autograd import AutogradBackend
from gptforge.training.backends.manual import ManualBackend


def optimizer_step(
    optimizer: Optimizer,
    backend: AutogradBackend | ManualBackend,
    scaler: torch.amp.GradScaler,
    ema: WeightEMA | None,
    max_norm: float,
    lr: float | Tensor,
    loss: Tensor,
) -> Tensor:
    """Unscale and clip the gradients, update the weights, and free the gradients.

    If the gradient norm or the loss is not finite, weights and optimizer state stay unchanged; this
    is decided on the device, without a sync.

    Args:
        optimizer: its learning rate is set.
        backend: computed the gradients.
        scaler: loss scaler for fp16; may be disabled.
        ema: average of the weights to update, if any.
        max_norm: maximum gradient norm; infinite for no clipping.
        lr: learning rate. As an fp32 scalar on the device it may change between replays of a CUDA
            graph.
        loss: of this step; NaN if the gradients of a rank are incomplete.

    Returns:
        The gradient norm before clipping, on the device.
    """
    # The scaler is typed for torch.optim, but only uses what our base class has.
    torch_optimizer = cast(torch.optim.Optimizer, optimizer)
    scaler.unscale_(torch_optimizer)
    norm = backend.clip_grad_norm_(max_norm)
    optimizer.set_lr(lr)
    if not scaler.is_enabled():
        # 0 * x is NaN iff x is NaN or Inf, and NaN != 0: two kernels instead of isfinite's seven.
        # An enabled scaler sets this flag instead.
        optimizer.found_inf = (norm + loss).mul_(0).ne_(0)
    # The optimizers read found_inf on the device, where `if norm.isfinite()` would sync.
    scaler.step(torch_optimizer)
    scaler.update()
    if ema is not None:
        ema.update()
    optimizer.zero_grad()
    return norm
