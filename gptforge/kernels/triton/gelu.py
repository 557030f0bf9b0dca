"""Backward of the GELU; see `gptforge.kernels.gelu`.

gelu(x) = x * (1 + tanh(a)) / 2 with a = sqrt(2 / pi) * (x + 0.044715 * x^3), and (1 + tanh(a)) / 2
is sigmoid(2 * a), which takes one exponential.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) is exp2(x * LOG2_E), and exp2 is one instruction."""
SCALE = tl.constexpr(1.5957691216057308)
"""2 * sqrt(2 / pi)."""


@triton.jit
def gelu_terms(x):
    """sigmoid(2 * a), and the derivative of gelu(x) = x * sigmoid(2 * a)."""
    square = x * x
    inner = x * (SCALE + SCALE * 0.044715 * square)
    sigmoid = 1.0 / (1.0 + tl.exp2(inner * -LOG2_E))
    d_inner = SCALE + 3.0 * SCALE * 0.044715 * square
    return sigmoid, sigmoid + (sigmoid - sigmoid * sigmoid) * x * d_inner


@triton.jit(do_not_specialize=["rows", "steps"])
def gelu_backward(
    x,  # (rows, columns), overwritten by gelu(x) if RECOMPUTE
    grad_output,  # (rows, columns), overwritten by the gradient of x
    partials,  # (programs, columns) fp32, sums of that gradient over rows
    rows, steps, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RECOMPUTE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dy * (s + x * s * (1 - s) * d(2a)/dx) with s = sigmoid(2 * a)."""
    pid = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        # Last rows first: the GEMM before wrote them last, so they are still in the L2 cache.
        row = ((steps - 1 - step) * tl.num_programs(1) + pid) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
        sigmoid, derivative = gelu_terms(value)
        rounded = (dy * derivative).to(grad_output.dtype.element_ty)
        tl.store(grad_output + offset, rounded, mask=mask)
        if RECOMPUTE:
            tl.store(x + offset, (value * sigmoid).to(x.dtype.element_ty), mask=mask)
        total += tl.sum(rounded.to(tl.float32), 0)
    tl.store(partials + pid.to(tl.int64) * columns + column, total, mask=in_row)
