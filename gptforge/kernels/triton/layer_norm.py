"""LayerNorm kernels; see `gptforge.kernels.layer_norm`. A program holds whole rows in registers."""

import triton
import triton.language as tl

from gptforge.kernels.triton.dropout import dropout, hash_columns, hash_rows, load_rate
from gptforge.kernels.triton.float8 import saturate


@triton.jit(do_not_specialize=["rows"])
def add_layer_norm(
    residual,  # (rows, columns)
    x,  # (rows, columns), overwritten by the sum
    weight, bias,  # (columns,) fp32
    out,  # (rows, columns), may be fp8
    mean, rstd,  # (rows,) fp32
    seeds,  # (4,) int32, see `DropoutSeed`
    rows, eps, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_X: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """x = residual + dropout(x); out = layer_norm(x)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_X:
        y = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            y = dropout(y, hash_rows(row, seeds), hash_columns(column, seeds), load_rate(seeds))
        total += y
        rounded = total.to(x.dtype.element_ty)
        tl.store(x + offset, rounded, mask=mask)
        # Normalize the rounded sum: it is what the backward pass will read.
        total = rounded.to(tl.float32)
    mu = tl.sum(total, 1) / columns
    # Two passes over registers: E[x^2] - E[x]^2 would cancel where the mean is large.
    centered = tl.where(mask, total - mu[:, None], 0.0)
    rs = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / columns + eps)
    w = tl.load(weight + column, mask=column < columns, other=0.0)
    b = tl.load(bias + column, mask=column < columns, other=0.0)
    y = centered * rs[:, None] * w[None, :] + b[None, :]
    tl.store(out + offset, saturate(y, out.dtype.element_ty), mask=mask)
    tl.store(mean + row, mu, mask=row < rows)
    tl.store(rstd + row, rs, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "steps"])
def layer_norm_backward(
    grad_output,  # (rows, columns), overwritten by the residual's gradient
    residual,  # (rows, columns), the LayerNorm's input
    mean, rstd,  # (rows,) fp32
    weight,  # (columns,) fp32
    grad_residual,  # (rows, columns)
    grad_x,  # (rows, columns), written only with dropout
    partials,  # (programs, 3, columns) fp32: sums for weight, bias and x's bias
    seeds,  # (4,) int32, see `DropoutSeed`
    rows, steps, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_GRAD_RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (w * dy - mean(w * dy) - x_hat * mean(w * dy * x_hat)), plus grad_residual."""
    pid = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    in_row = column < columns
    w = tl.load(weight + column, mask=in_row, other=0.0)[None, :]
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    dx_bias = tl.zeros((BLOCK,), tl.float32)
    if DROPOUT:
        column_hash, rate = hash_columns(column, seeds), load_rate(seeds)
    for step in tl.range(0, steps, num_stages=STAGES):
        # Last rows first: the GEMM before wrote them last, so they are still in the L2 cache.
        row = ((steps - 1 - step) * tl.num_programs(0) + pid) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & in_row[None, :]
        offset = row.to(tl.int64)[:, None] * columns + column[None, :]
        dy = tl.load(grad_output + offset, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        rs = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        x_hat = tl.where(mask, (x - mu) * rs, 0.0)
        dw += tl.sum(dy * x_hat, 0)
        db += tl.sum(dy, 0)
        dy *= w
        c1 = tl.sum(dy * x_hat, 1)[:, None] / columns
        c2 = tl.sum(dy, 1)[:, None] / columns
        dx = (dy - c2 - x_hat * c1) * rs
        if HAS_GRAD_RESIDUAL:
            dx += tl.load(grad_residual + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = dx.to(grad_output.dtype.element_ty)
        tl.store(grad_output + offset, rounded, mask=mask)
        if DROPOUT:
            masked = dropout(rounded.to(tl.float32), hash_rows(row, seeds), column_hash, rate)
            rounded = masked.to(grad_output.dtype.element_ty)
            tl.store(grad_x + offset, rounded, mask=mask)
        dx_bias += tl.sum(tl.where(mask, rounded.to(tl.float32), 0.0), 0)
    partial = partials + pid.to(tl.int64) * 3 * columns + column
    tl.store(partial, dw, mask=in_row)
    tl.store(partial + columns, db, mask=in_row)
    tl.store(partial + 2 * columns, dx_bias, mask=in_row)
