"""The products of a layer, both ways, and what comes right behind them: bias, GELU, its slope.

On a CUDA device in bfloat16 cuBLASLt does both in one pass (see cublaslt.py), elsewhere torch one
after the other. The GELU is the tanh form.

Shapes: N tokens; a weight is (out, in), as torch's linear layers keep it.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels import cublaslt
from gptforge.kernels.block import gelu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (N, in) to (N, out)."""
    epilogue = cublaslt.PLAIN if bias is None else cublaslt.WITH_BIAS
    if plan := _plan(x, weight, turned=(False, True), epilogue=epilogue):
        return plan(x, weight, x.new_empty(len(x), len(weight)), bias=bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear` gives, and the GELU of that: two (N, out)."""
    if plan := _plan(x, weight, turned=(False, True), epilogue=cublaslt.GELU_AND_INPUT):
        inner = x.new_empty(len(x), len(weight))
        return inner, plan(x, weight, torch.empty_like(inner), bias=bias, aux=inner)
    inner = linear(x, weight, bias)
    return inner, gelu(inner)


def back(upstream: Tensor, weight: Tensor) -> Tensor:
    """upstream @ weight, the gradient of a linear layer's input: (N, out) to (N, in)."""
    if plan := _plan(upstream, weight):
        return plan(upstream, weight, upstream.new_empty(len(upstream), weight.size(1)))
    return upstream @ weight


def back_through_gelu(upstream: Tensor, weight: Tensor, inner: Tensor) -> Tensor:
    """The gradient of `inner` (N, in), whose GELU went into the linear layer."""
    if plan := _plan(upstream, weight, epilogue=cublaslt.THROUGH_GELU):
        return plan(upstream, weight, torch.empty_like(inner), aux=inner)
    slope: Tensor = torch.ops.aten.gelu_backward(upstream @ weight, inner, approximate="tanh")
    return slope


def add_product(gradient: Tensor, upstream: Tensor, x: Tensor) -> None:
    """Add upstream.T (out, N) @ x (N, in) to the gradient of a weight (out, in), in its type."""
    if (
        gradient.dtype == torch.float32
        and _can_take(gradient)
        and (plan := _plan(upstream, x, turned=(True, False), adds=True))
    ):
        plan(upstream, x, gradient)
    elif x.is_cuda and x.dtype != gradient.dtype:
        # Summed in float32 inside the product, and never rounded to the factors' type.
        torch.addmm(gradient, upstream.t(), x, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient += upstream.t() @ x


def _plan(
    left: Tensor,
    right: Tensor,
    *,
    turned: tuple[bool, bool] = (False, False),
    epilogue: int = cublaslt.PLAIN,
    adds: bool = False,
) -> cublaslt.Plan | None:
    """How cuBLASLt computes it; None where it does not."""
    if not left.is_cuda or left.dtype != torch.bfloat16 or right.dtype != torch.bfloat16:
        return None
    if torch.version.hip or not (_can_take(left) and _can_take(right)):
        return None
    return _remembered(left.device, left.shape, right.shape, turned, epilogue, adds)


def _can_take(factor: Tensor) -> bool:
    return factor.is_contiguous() and factor.data_ptr() % cublaslt.ALIGNMENT == 0


@cache
def _remembered(
    device: torch.device,
    left: torch.Size,
    right: torch.Size,
    turned: tuple[bool, bool],
    epilogue: int,
    adds: bool,
) -> cublaslt.Plan | None:
    try:
        return cublaslt.Plan(device, left, right, turned=turned, epilogue=epilogue, adds=adds)
    except (OSError, RuntimeError):
        # No library by that name (Windows), or no kernel for an odd shape.
        return None
