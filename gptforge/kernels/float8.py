"""Casts to fp8 in the two layouts that matmuls read: row-major, and transposed.

A Hopper GPU multiplies fp8 matrices only if both are contiguous along the dimension that is summed
over: channels in a forward matmul, tokens in a weight gradient. So each tensor is needed in both
layouts, and one pass writes both.

Shapes: N tokens, C channels.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.launch import uses_triton
from gptforge.kernels.reductions import Pending, accumulate_partials

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
"""4 bits of exponent and 3 of mantissa, up to 448; and 5 and 2, up to 57344 and down to 2**-16."""
ROWS, COLUMNS, NUM_WARPS = 128, 64, 8
"""Tile of a program: rows are 128 bytes of bf16, and columns 128 bytes of fp8."""


class Float8Tensor(NamedTuple):
    """A matrix of about `data * scale_inv`."""

    data: Tensor
    """(N, C) in fp8."""
    transpose: Tensor
    """(C, N), a copy."""
    scale_inv: Tensor
    """() float32."""


@cache
def unit_scale(device: torch.device) -> Tensor:
    """The `scale_inv` of tensors that are not scaled."""
    return torch.ones((), device=device)


def empty_float8(x: Tensor, dtype: torch.dtype, scale_inv: Tensor) -> Float8Tensor:
    """Allocate a `Float8Tensor` of the shape of `x`."""
    rows, columns = x.shape
    data, transpose = (x.new_empty(s, dtype=dtype) for s in ((rows, columns), (columns, rows)))
    return Float8Tensor(data, transpose, scale_inv)


def cast_transpose(x: Tensor, out: Float8Tensor, *, gelu: bool = False) -> Float8Tensor:
    """Write `x` (N, C), or with `gelu` its tanh GELU, divided by `out.scale_inv`, to `out`."""
    if not uses_triton(x):
        value = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
        return _write_torch(value, out)
    _launch_cast_transpose(x, out.data, out.transpose, out.scale_inv, cast=True, gelu=gelu)
    return out


def transpose(x: Tensor) -> Tensor:
    """Copy the fp8 matrix `x` (N, C) to (C, N)."""
    if not uses_triton(x):
        return x.view(torch.uint8).t().contiguous().view(x.dtype)
    out_t = x.new_empty(x.size(1), x.size(0))
    _launch_cast_transpose(x, x, out_t, unit_scale(x.device), cast=False, gelu=False)
    return out_t


def gelu_backward_cast_transpose(
    x: Tensor,
    grad_output: Tensor,
    out: Float8Tensor,
    bias_grad: Tensor,
    pending: Pending = None,
) -> Float8Tensor:
    """Backward of GELU(x); the gradient is only written in fp8.

    Args:
        x: (N, C), the GELU's input.
        grad_output: (N, C).
        out: gets the gradient of `x`, divided by `out.scale_inv`.
        bias_grad: (C,) float32, to which the sum of the gradient over its rows is added.
        pending: defers that sum.
    """
    if not uses_triton(x):
        grad = torch.ops.aten.gelu_backward(grad_output.float(), x.float(), approximate="tanh")
        bias_grad += grad.sum(0)
        return _write_torch(grad, out)
    from gptforge.kernels.triton import float8 as kernels

    rows, columns = x.shape
    assert x.is_contiguous() and grad_output.is_contiguous()
    grid = (math.ceil(columns / COLUMNS), math.ceil(rows / ROWS))
    partials = torch.empty(grid[1], columns, dtype=torch.float32, device=x.device)
    kernels.gelu_backward_cast_transpose[grid](
        x, grad_output, out.data, out.transpose, partials, out.scale_inv, rows, columns,
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS,
    )  # fmt: skip
    accumulate_partials(partials, bias_grad, pending)
    return out


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to `dtype`. In fp8, larger values become the largest, and NaN stays NaN."""
    if dtype in (E4M3, E5M2):
        limit = torch.finfo(dtype).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def _write_torch(value: Tensor, out: Float8Tensor) -> Float8Tensor:
    scaled = (value * (1 / out.scale_inv)).bfloat16()  # as the kernels do
    out.data.copy_(saturate(scaled, out.data.dtype))
    out.transpose.copy_(transpose(out.data))
    return out


def _launch_cast_transpose(
    x: Tensor, out: Tensor, out_t: Tensor, scale_inv: Tensor, *, cast: bool, gelu: bool
) -> None:
    from gptforge.kernels.triton import float8 as kernels

    rows, columns = x.shape
    assert x.is_contiguous()
    kernels.cast_transpose[(math.ceil(columns / COLUMNS), math.ceil(rows / ROWS))](
        x, out, out_t, scale_inv, rows, columns,
        ROWS=ROWS, COLUMNS=COLUMNS, CAST=cast, GELU=gelu, num_warps=NUM_WARPS,
    )  # fmt: skip
