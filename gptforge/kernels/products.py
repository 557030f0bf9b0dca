"""The products of a layer and what comes right behind them: bias, GELU, the GELU's slope.

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
    if plan := _plan(x, weight, transposed=True, epilogue=epilogue):
        return plan(x, weight, x.new_empty(len(x), len(weight)), bias=bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear` gives, and the GELU of that: two (N, out)."""
    if plan := _plan(x, weight, transposed=True, epilogue=cublaslt.GELU_AND_INPUT):
        inner = x.new_empty(len(x), len(weight))
        return inner, plan(x, weight, torch.empty_like(inner), bias=bias, aux=inner)
    inner = linear(x, weight, bias)
    return inner, gelu(inner)


def back(upstream: Tensor, weight: Tensor) -> Tensor:
    """upstream @ weight, the gradient of a linear layer's input: (N, out) to (N, in)."""
    if plan := _plan(upstream, weight, transposed=False, epilogue=cublaslt.PLAIN):
        return plan(upstream, weight, upstream.new_empty(len(upstream), weight.size(1)))
    return upstream @ weight


def back_through_gelu(upstream: Tensor, weight: Tensor, inner: Tensor) -> Tensor:
    """The gradient of `inner` (N, in), whose GELU went into the linear layer."""
    if plan := _plan(upstream, weight, transposed=False, epilogue=cublaslt.THROUGH_GELU):
        return plan(upstream, weight, torch.empty_like(inner), aux=inner)
    slope: Tensor = torch.ops.aten.gelu_backward(upstream @ weight, inner, approximate="tanh")
    return slope


def _plan(left: Tensor, weight: Tensor, *, transposed: bool, epilogue: int) -> cublaslt.Plan | None:
    """How cuBLASLt computes it; None where it does not."""
    if not left.is_cuda or left.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return None
    if torch.version.hip or not (left.is_contiguous() and weight.is_contiguous()):
        return None
    if left.data_ptr() % cublaslt.ALIGNMENT or weight.data_ptr() % cublaslt.ALIGNMENT:
        return None
    return _remembered(left.device, len(left), weight.shape, transposed, epilogue)


@cache
def _remembered(
    device: torch.device, rows: int, weight: torch.Size, transposed: bool, epilogue: int
) -> cublaslt.Plan | None:
    try:
        return cublaslt.Plan(device, rows, weight, transposed=transposed, epilogue=epilogue)
    except (OSError, RuntimeError):
        # No library by that name (Windows), or no kernel for an odd shape.
        return None
