"""Backward of GPT-2's tanh GELU; the forward is torch's, or the epilogue of a GEMM."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.launch import num_sms, uses_triton
from gptforge.kernels.reductions import Pending, accumulate_partials


def gelu_backward(
    x: Tensor, grad_output: Tensor, bias_grad: Tensor, pending: Pending = None, *, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Backward of GELU(x), with the sum over rows for the bias gradient in the same pass.

    Recomputing GELU(x) adds a third to this pass and saves a quarter of a block's activation
    memory.

    Args:
        x: (N, C), the GELU's input; overwritten by GELU(x) with `recompute`.
        grad_output: (N, C).
        bias_grad: (C,) float32, to which the sum of the gradient over its rows is added.
        pending: defers that sum.
        recompute: also compute GELU(x), for the weight gradient of the next linear layer.

    Returns:
        The gradient of `x`, which overwrites `grad_output`, and `x`: GELU(x) with `recompute`.
    """
    if not uses_triton(x):
        act = F.gelu(x, approximate="tanh") if recompute else x
        grad_output.copy_(torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh"))
        bias_grad += grad_output.sum(0, dtype=bias_grad.dtype)
        return grad_output, x.copy_(act)
    from gptforge.kernels.triton import gelu as kernels

    rows, columns = x.shape
    assert x.is_contiguous() and grad_output.is_contiguous()
    column_blocks = math.ceil(columns / 512)
    # A grid of fixed size whose programs loop over rows: each program writes one partial sum, and
    # the second reduction reads all of them.
    stages, programs_per_sm = (2, 16) if columns <= 2048 else (3, 6)
    programs = max(1, programs_per_sm * num_sms(x.device) // column_blocks)
    programs = min(programs, math.ceil(rows / 16))
    partials = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    kernels.gelu_backward[(column_blocks, programs)](
        x, grad_output, partials, rows, math.ceil(rows / (programs * 4)), columns,
        BLOCK=512, ROWS=4, RECOMPUTE=recompute, STAGES=stages, num_warps=2,
    )  # fmt: skip
    accumulate_partials(partials, bias_grad, pending)
    return grad_output, x
