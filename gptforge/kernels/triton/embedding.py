"""Embedding kernels; see `gptforge.kernels.embedding`."""

import triton
import triton.language as tl

from gptforge.kernels.triton.dropout import dropout, hash_columns, hash_rows, load_rate


@triton.jit(do_not_specialize=["rows", "length"])
def embedding(
    idx,  # (rows,) token ids
    wte, wpe,  # (V, columns) and (length or more, columns)
    out,  # (rows, columns)
    seeds,  # (4,) int32, see `DropoutSeed`
    rows, length, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """out = dropout(wte[idx] + wpe[position]); each program takes ROWS tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(wte + token[:, None] * columns + column[None, :], mask=mask, other=0.0)
    x += tl.load(wpe + (row % length)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    if DROPOUT:
        x = dropout(x, hash_rows(row, seeds), hash_columns(column, seeds), load_rate(seeds))
    tl.store(out + offset, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def embedding_backward(
    grad_output,  # (rows, columns)
    idx,  # (rows,) token ids
    weight_grad,  # (V, columns)
    rows, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """weight_grad[idx] += grad_output, by atomics: many tokens may share an id."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    dy = tl.load(grad_output + offset, mask=mask, other=0.0).to(weight_grad.dtype.element_ty)
    target = weight_grad + token[:, None] * columns + column[None, :]
    # relaxed: additions need no order among each other, only to be atomic.
    tl.atomic_add(target, dy, mask=mask, sem="relaxed")
