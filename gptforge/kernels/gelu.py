"""GPT-2's tanh GELU: for autograd, and the backward alone.

With s = sigmoid(2a) and a = sqrt(2 / pi) * (x + 0.044715 * x^3), it is gelu(x) = x * s, and its
derivative is s + x * s * (1 - s) * d(2a)/dx.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptforge.kernels.launch import num_sms, uses_triton
from gptforge.kernels.reductions import Pending, accumulate_partials

_SCALE, _CUBIC = math.sqrt(8 / math.pi), 0.044715
_CPU_CHUNK = 2**17
"""Elements per chunk on a CPU: intermediate results stay in the L2 or L3 cache."""


def gelu(x: Tensor, approximate: str) -> Tensor:
    """`F.gelu`, but twice as fast on a CPU in the tanh form: torch's tanh is slow there."""
    is_slow = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if approximate != "tanh" or not is_slow or torch.compiler.is_compiling():
        return F.gelu(x, approximate=approximate)
    y: Tensor = _TanhGELU.apply(x)  # type: ignore[no-untyped-call]
    return y


class _TanhGELU(torch.autograd.Function):
    """The forward computes the derivative, too, and saves it instead of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        derivative = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        flat_x, flat_y = x.reshape(-1), y.view(-1)
        for start in range(0, x.numel(), _CPU_CHUNK):
            chunk = slice(start, start + _CPU_CHUNK)
            fp32 = flat_x[chunk].float()
            square = fp32 * fp32
            sigmoid = torch.addcmul(fp32, fp32, square, value=_CUBIC).mul_(_SCALE).sigmoid_()
            torch.mul(fp32, sigmoid, out=flat_y[chunk])
            if derivative is not None:
                inner = torch.ops.aten.sigmoid_backward(fp32, sigmoid)  # x * s * (1 - s)
                # d(2a)/dx = scale * (1 + 3 * cubic * x^2)
                square.add_(1 / (3 * _CUBIC))
                torch.addcmul(
                    sigmoid, inner, square, value=3 * _CUBIC * _SCALE,
                    out=derivative.view(-1)[chunk],
                )  # fmt: skip
        ctx.save_for_backward(derivative)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_output: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        grad_x: Tensor = grad_output[0] * derivative
        return grad_x


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
