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
from gptforge.kernels.gelu import gelu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (N, in) to (N, out)."""
    epilogue = cublaslt.EPILOGUE_DEFAULT if bias is None else cublaslt.EPILOGUE_BIAS
    if plan := _plan(x, weight, turned=(False, True), epilogue=epilogue):
        return plan(x, weight, x.new_empty(len(x), len(weight)), bias=bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear` gives, and the GELU of that: two (N, out)."""
    if plan := _plan(x, weight, turned=(False, True), epilogue=cublaslt.EPILOGUE_GELU_AUX_BIAS):
        inner = x.new_empty(len(x), len(weight))
        return inner, plan(x, weight, torch.empty_like(inner), bias=bias, aux=inner)
    inner = linear(x, weight, bias)
    return inner, gelu(inner)


def linear_dgrad(grad_output: Tensor, weight: Tensor) -> Tensor:
    """upstream @ weight, the gradient of a linear layer's input: (N, out) to (N, in)."""
    if plan := _plan(grad_output, weight):
        return plan(grad_output, weight, grad_output.new_empty(len(grad_output), weight.size(1)))
    return grad_output @ weight


def linear_dgrad_dgelu(grad_output: Tensor, weight: Tensor, pre_act: Tensor) -> Tensor:
    """The gradient of `inner` (N, in), whose GELU went into the linear layer."""
    if plan := _plan(grad_output, weight, epilogue=cublaslt.EPILOGUE_DGELU):
        return plan(grad_output, weight, torch.empty_like(pre_act), aux=pre_act)
    slope: Tensor = torch.ops.aten.gelu_backward(grad_output @ weight, pre_act, approximate="tanh")
    return slope


def accumulate_wgrad(weight_grad: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """Add upstream.T (out, N) @ x (N, in) to the gradient of a weight (out, in), in its type."""
    if (
        weight_grad.dtype == torch.float32
        and _is_aligned(weight_grad)
        and (plan := _plan(grad_output, x, turned=(True, False), adds=True))
    ):
        plan(grad_output, x, weight_grad)
    elif x.is_cuda and x.dtype != weight_grad.dtype:
        # Summed in float32 inside the product, and never rounded to the factors' type.
        torch.addmm(weight_grad, grad_output.t(), x, out_dtype=weight_grad.dtype, out=weight_grad)
    else:
        weight_grad += grad_output.t() @ x


def _plan(
    left: Tensor,
    right: Tensor,
    *,
    turned: tuple[bool, bool] = (False, False),
    epilogue: int = cublaslt.EPILOGUE_DEFAULT,
    adds: bool = False,
) -> cublaslt.MatmulPlan | None:
    """How cuBLASLt computes it; None where it does not."""
    if not left.is_cuda or left.dtype != torch.bfloat16 or right.dtype != torch.bfloat16:
        return None
    if torch.version.hip or not (_is_aligned(left) and _is_aligned(right)):
        return None
    return _cached_plan(left.device, left.shape, right.shape, turned, epilogue, adds)


def _is_aligned(factor: Tensor) -> bool:
    return factor.is_contiguous() and factor.data_ptr() % cublaslt.ALIGNMENT == 0


@cache
def _cached_plan(
    device: torch.device,
    left: torch.Size,
    right: torch.Size,
    turned: tuple[bool, bool],
    epilogue: int,
    adds: bool,
) -> cublaslt.MatmulPlan | None:
    try:
        return cublaslt.MatmulPlan(
            device, left, right, transpose=turned, epilogue=epilogue, accumulate=adds
        )
    except (OSError, RuntimeError):
        # No library by that name (Windows), or no kernel for an odd shape.
        return None
