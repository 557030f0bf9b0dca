"""The elementwise operations of Muon's step, each in one pass over memory on a GPU.

The lists in a call correspond element by element, and their tensors are contiguous.
"""

import logging
import math
from functools import cache

import torch
from torch import Tensor

from gptforge.kernels.launch import uses_triton

logger = logging.getLogger(__name__)

BLOCK = 4096
"""Elements of a program."""


@cache
def can_launch(device: torch.device) -> bool:
    """Whether Triton is installed and compiles; without it the optimizer uses torch."""
    param, ones = torch.zeros(2, device=device), torch.ones(2, device=device)
    try:
        _apply_update([param], [ones], ones, 0.0, 1.0, None)
    except Exception as error:  # no Triton, no C compiler, an unknown GPU
        logger.debug(f"Muon's fused kernels do not run here: {error!r}")
        return False
    return bool((param == -1).all())


def update_momentum(
    grads: list[Tensor],
    buffers: list[Tensor],
    out: list[Tensor],
    *,
    momentum: float,
    found_inf: Tensor | None,
) -> None:
    """Average the gradients into float32 buffers, and write Nesterov's momentum to `out`.

    With `found_inf` above 0 the buffers stay as they are, and `out` is finite.
    """
    if not (uses_triton(buffers[0]) and can_launch(buffers[0].device)):
        if found_inf is not None:
            skip = found_inf > 0
            # With the momentum in place of the gradient, the lerp below does not change it.
            grads = [torch.where(skip, b, g) for b, g in zip(buffers, grads, strict=True)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_copy_(out, torch._foreach_lerp(grads, buffers, momentum))
        return
    from gptforge.kernels.triton import muon as kernels

    for grad, buffer, result in zip(grads, buffers, out, strict=True):
        kernels.update_momentum[(math.ceil(buffer.numel() / BLOCK),)](
            grad, buffer, result, buffer if found_inf is None else found_inf, buffer.numel(),
            WEIGHT=1 - momentum, HAS_FOUND_INF=found_inf is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


def apply_update(
    params: list[Tensor],
    updates: list[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float,
    scale: float,
    found_inf: Tensor | None,
) -> None:
    """params = (1 - lr * weight_decay) * params - lr * scale * updates, unless `found_inf` > 0."""
    if not (uses_triton(params[0]) and can_launch(params[0].device)):
        if found_inf is not None:
            lr = lr * (found_inf == 0)
        # With a dimension: a scalar tensor would not promote the product to float32.
        factor = params[0].new_full((1,), -scale) * lr
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, [update * factor for update in updates])
        return
    rate = lr if isinstance(lr, Tensor) else params[0].new_full((), lr)
    _apply_update(params, updates, rate, weight_decay, scale, found_inf)


def _apply_update(
    params: list[Tensor],
    updates: list[Tensor],
    lr: Tensor,
    weight_decay: float,
    scale: float,
    found_inf: Tensor | None,
) -> None:
    from gptforge.kernels.triton import muon as kernels

    for param, update in zip(params, updates, strict=True):
        kernels.apply_update[(math.ceil(param.numel() / BLOCK),)](
            param, update, lr, lr if found_inf is None else found_inf, weight_decay, scale,
            param.numel(), HAS_FOUND_INF=found_inf is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
