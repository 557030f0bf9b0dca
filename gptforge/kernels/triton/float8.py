"""Casts to fp8 in two layouts; see `gptforge.kernels.float8`. Each program takes a tile."""

import triton
import triton.language as tl

from gptforge.kernels.triton.gelu import gelu_terms


@triton.jit
def saturate(x, dtype: tl.constexpr):
    """Cast to `dtype`. In fp8, larger values become the largest, and NaN stays NaN."""
    if dtype == tl.float8e4nv:
        x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.float8e5:
        x = tl.clamp(x, -57344.0, 57344.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def cast_transpose(
    x,  # (rows, columns)
    out,  # (rows, columns) fp8; not written without CAST
    out_t,  # (columns, rows) fp8
    scale_inv,  # () fp32
    rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAST: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """out = x / scale_inv, or gelu(x) / scale_inv, and its transpose; without CAST x is in fp8."""
    offset, mask = _tile(rows, columns, ROWS, COLUMNS)
    tile = tl.load(x + offset, mask=mask, other=0.0)
    if CAST:
        value = tile.to(tl.float32)
        if GELU:
            sigmoid, _ = gelu_terms(value)
            value *= sigmoid
        _store_both(out, out_t, value, scale_inv, offset, mask, rows, ROWS, COLUMNS)
    else:
        offset_t = _transposed_offset(rows, ROWS, COLUMNS)
        tl.store(out_t + offset_t, tl.trans(tile), mask=tl.trans(mask))


@triton.jit
def gelu_backward_cast_transpose(
    x,  # (rows, columns), the GELU's input
    grad_output,  # (rows, columns)
    out,  # (rows, columns) fp8, the gradient of x
    out_t,  # (columns, rows) fp8
    partials,  # (programs along rows, columns) fp32, sums of that gradient over rows
    scale_inv,  # () fp32
    rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = grad_output * gelu'(x) / scale_inv, and its transpose."""
    offset, mask = _tile(rows, columns, ROWS, COLUMNS)
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
    _, derivative = gelu_terms(value)
    dx = dy * derivative
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    partial = partials + tl.program_id(1).to(tl.int64) * columns + column
    tl.store(partial, tl.sum(dx, 0), mask=column < columns)
    _store_both(out, out_t, dx, scale_inv, offset, mask, rows, ROWS, COLUMNS)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of this program's tile, (ROWS, COLUMNS) each."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row.to(tl.int64)[:, None] * columns + column[None, :], mask


@triton.jit
def _store_both(
    out, out_t, value, scale_inv, offset, mask, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Store `value / scale_inv` in fp8 to both layouts."""
    # Rounded to bf16, because Triton 3.6 mixes up the bytes when it transposes a tile that it has
    # just cast from fp32 to fp8.
    tile = (value * (1.0 / tl.load(scale_inv))).to(tl.bfloat16)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + offset, saturate(tile.to(tl.float32), dtype), mask=mask)
    tile_t = saturate(tl.trans(tile).to(tl.float32), dtype)
    tl.store(out_t + _transposed_offset(rows, ROWS, COLUMNS), tile_t, mask=tl.trans(mask))


@triton.jit
def _transposed_offset(rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of this program's tile in the transpose, (COLUMNS, ROWS)."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return column.to(tl.int64)[:, None] * rows + row[None, :]
