"""The GEMMs of a linear layer, forward and backward, with bias or GELU in the epilogue.

On CUDA in bfloat16 cuBLASLt runs GEMM and epilogue in one kernel (cublaslt.py); elsewhere they are
separate torch operations. The GELU is the tanh form.

Shapes: N tokens; a weight is (out, in), as in `nn.Linear`.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels import cublaslt
from gptforge.kernels.cublaslt import Epilogue
from gptforge.kernels.gelu import gelu_backward
from gptforge.kernels.reductions import Pending, accumulate_column_sums

PLAN_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (N, in) to (N, out)."""
    epilogue = Epilogue.DEFAULT if bias is None else Epilogue.BIAS
    if plan := find_plan(x, weight, transpose=(False, True), epilogue=epilogue):
        return plan(x, weight, x.new_empty(len(x), len(weight)), bias=bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`linear(x, weight, bias)` and its GELU, (N, out) each."""
    if plan := find_plan(x, weight, transpose=(False, True), epilogue=Epilogue.GELU_AUX_BIAS):
        pre_act = x.new_empty(len(x), len(weight))
        return pre_act, plan(x, weight, torch.empty_like(pre_act), bias=bias, aux=pre_act)
    pre_act = linear(x, weight, bias)
    return pre_act, F.gelu(pre_act, approximate="tanh")


def linear_dgrad(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a linear layer's input, grad_output @ weight: (N, out) to (N, in)."""
    if plan := find_plan(grad_output, weight):
        return plan(grad_output, weight, grad_output.new_empty(len(grad_output), weight.size(1)))
    return grad_output @ weight


def linear_dgrad_dgelu(grad_output: Tensor, weight: Tensor, pre_act: Tensor) -> Tensor:
    """Gradient of `pre_act` (N, in), whose GELU is the linear layer's input."""
    if plan := find_plan(grad_output, weight, epilogue=Epilogue.DGELU):
        return plan(grad_output, weight, torch.empty_like(pre_act), aux=pre_act)
    grad: Tensor = torch.ops.aten.gelu_backward(grad_output @ weight, pre_act, approximate="tanh")
    return grad


def linear_gelu_backward(
    grad_output: Tensor,
    weight: Tensor,
    pre_act: Tensor,
    act: Tensor | None,
    bias_grad: Tensor,
    pending: Pending = None,
    *,
    separate_dgelu: bool,
) -> tuple[Tensor, Tensor]:
    """Backward through the MLP's second linear layer and its GELU.

    Args:
        grad_output: (N, C) gradient of the MLP's output.
        weight: (C, d_ff) of the second layer.
        pre_act: (N, d_ff), the GELU's input; overwritten if `act` is None.
        act: (N, d_ff), the GELU's output; None recomputes it.
        bias_grad: (d_ff,) float32 of the first layer, to which the column sums are added.
        pending: defers these sums.
        separate_dgelu: with `act`, apply the GELU's derivative in the kernel that sums for the
            bias, instead of in the GEMM's epilogue (DGELU).

    Returns:
        The gradient of `pre_act`, and the GELU's output, (N, d_ff) each.
    """
    if act is not None and not separate_dgelu:
        grad = linear_dgrad_dgelu(grad_output, weight, pre_act)
        accumulate_column_sums(grad, bias_grad, pending)
        return grad, act
    grad = linear_dgrad(grad_output, weight)
    grad, x = gelu_backward(pre_act, grad, bias_grad, pending, recompute=act is None)
    return grad, x if act is None else act


def accumulate_wgrad(weight_grad: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """weight_grad += grad_output.T @ x: (out, N) @ (N, in) onto (out, in), in its dtype."""
    if (
        weight_grad.dtype == torch.float32
        and is_aligned(weight_grad)
        and (plan := find_plan(grad_output, x, transpose=(True, False), accumulate=True))
    ):
        plan(grad_output, x, weight_grad)
    elif x.is_cuda and x.dtype != weight_grad.dtype:
        # The GEMM writes float32: the gradient is never rounded to bfloat16.
        torch.addmm(weight_grad, grad_output.t(), x, out_dtype=weight_grad.dtype, out=weight_grad)
    else:
        weight_grad += grad_output.t() @ x


def find_plan(
    left: Tensor,
    right: Tensor,
    *,
    transpose: tuple[bool, bool] = (False, False),
    epilogue: Epilogue = Epilogue.DEFAULT,
    accumulate: bool = False,
    fast_accum: bool = False,
) -> cublaslt.MatmulPlan | None:
    """A cuBLASLt plan for this GEMM; None leaves it to torch."""
    dtypes = (left.dtype, right.dtype)
    if not left.is_cuda or not all(dtype in PLAN_DTYPES for dtype in dtypes):
        return None
    if torch.version.hip or not (is_aligned(left) and is_aligned(right)):
        return None
    # Cached by shape: a new plan queries the heuristic, and autotunes in its first call.
    return _cached_plan(
        left.device, left.shape, right.shape, dtypes, transpose, epilogue, accumulate, fast_accum
    )


def is_aligned(x: Tensor) -> bool:
    """Whether cuBLASLt's kernels can read or write this tensor."""
    return x.is_contiguous() and x.data_ptr() % cublaslt.ALIGNMENT == 0


@cache
def _cached_plan(*args: Any) -> cublaslt.MatmulPlan | None:
    try:
        return cublaslt.MatmulPlan(*args)
    except torch.OutOfMemoryError:
        raise  # a smaller micro-batch may fit
    except (OSError, RuntimeError):
        # No library of that name (Windows), or no kernel for this shape, such as odd sizes.
        return None
