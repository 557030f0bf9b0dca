"""The kernels themselves, in Triton. Imported only where one is about to run.

The modules beside this one say what each computes, and have the plain torch for it. Rows are
tokens, columns channels. Sums over the rows are made in two steps, so that their order, and with it
every bit, is the same each time: each program leaves what it saw in a row of `parts`. Only
`add_rows` adds in any order.

`norm_backward` and `gelu_backward` follow the products that made what they read: all of their
programs go from the last rows to the first, for the last that were written are those that the cache
still holds.
"""

import triton
import triton.language as tl

from gptforge.kernels.in_triton_dropout import (
    column_words,
    factor_of,
    is_kept,
    row_words,
)
from gptforge.kernels.in_triton_head import LOG2_E

TWICE = tl.constexpr(1.5957691216057308)
"""2 * sqrt(2 / pi): the GELU's tanh of a is twice the logistic function of 2 a, less one."""


@triton.jit(do_not_specialize=["rows", "length"])
def embed(
    idx, wte, wpe, out, keys, rows, length,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """`out` (rows, columns): each token's row of `wte` and its place's row of `wpe`, added up."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(wte + token[:, None] * columns + column[None, :], mask=mask, other=0.0)
    x += tl.load(wpe + (row % length)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    if DROPPED:
        words = column_words(column, keys)
        stays = is_kept(row_words(row, keys)[:, None], words[None, :], DROPPED)
        x = tl.where(stays, x * factor_of(DROPPED), 0.0)
    tl.store(out + place, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_rows(x, idx, table, rows, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Each row of x (rows, columns) is added to the row of `table` that `idx` names."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = tl.load(idx + row, mask=row < rows, other=0)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    more = tl.load(x + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)
    place = table + token[:, None] * columns + column[None, :]
    tl.atomic_add(place, more.to(table.dtype.element_ty), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def add_norm(
    stream, branch, weight, bias, out, mean, rstd, keys, rows, eps,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BRANCH: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """`branch` becomes stream + branch, and `out` its LayerNorm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    x = tl.load(stream + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        more = tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
        if DROPPED:
            words = column_words(column, keys)
            stays = is_kept(row_words(row, keys)[:, None], words[None, :], DROPPED)
            more = tl.where(stays, more * factor_of(DROPPED), 0.0)
        x += more
        narrow = x.to(branch.dtype.element_ty)
        tl.store(branch + place, narrow, mask=mask)
        # What the backward pass will read, not what was never stored.
        x = narrow.to(tl.float32)
    average = tl.sum(x, 1) / columns
    apart = tl.where(mask, x - average[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / columns + eps)
    w = tl.load(weight + column, mask=column < columns, other=0.0)
    b = tl.load(bias + column, mask=column < columns, other=0.0)
    y = apart * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "turns"])
def norm_backward(
    upstream, stream, mean, rstd, weight, beside, to_branch, parts, keys, rows, turns,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BESIDE: tl.constexpr,
    DROPPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`upstream` becomes the stream's gradient; `parts` (P, 3, columns) sums for the parameters.

    If anything was dropped, `to_branch` becomes the branch's gradient.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight + column, mask=inside, other=0.0)[None, :]
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_branch = tl.zeros((BLOCK,), tl.float32)
    words = column_words(column, keys) if DROPPED else column
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = ((turns - 1 - turn) * tl.num_programs(0) + program) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        dy = tl.load(upstream + place, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(stream + place, mask=mask, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normal = tl.where(mask, (x - average) * inverse, 0.0)
        of_weight += tl.sum(dy * normal, 0)
        of_bias += tl.sum(dy, 0)
        dy *= w
        along = tl.sum(dy * normal, 1)[:, None] / columns
        level = tl.sum(dy, 1)[:, None] / columns
        dx = (dy - level - normal * along) * inverse
        if HAS_BESIDE:
            dx += tl.load(beside + place, mask=mask, other=0.0).to(tl.float32)
        narrow = dx.to(upstream.dtype.element_ty)
        tl.store(upstream + place, narrow, mask=mask)
        if DROPPED:
            stays = is_kept(row_words(row, keys)[:, None], words[None, :], DROPPED)
            more = tl.where(stays, narrow.to(tl.float32) * factor_of(DROPPED), 0.0)
            narrow = more.to(upstream.dtype.element_ty)
            tl.store(to_branch + place, narrow, mask=mask)
        of_branch += tl.sum(tl.where(mask, narrow.to(tl.float32), 0.0), 0)
    own = parts + program.to(tl.int64) * 3 * columns + column
    tl.store(own, of_weight, mask=inside)
    tl.store(own + columns, of_bias, mask=inside)
    tl.store(own + 2 * columns, of_branch, mask=inside)


@triton.jit
def gelu(x, out, count, BLOCK: tl.constexpr):
    """GELU in its tanh form."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    cubic = value * (TWICE + TWICE * 0.044715 * value * value)
    share = 1.0 / (1.0 + tl.exp2(cubic * -LOG2_E))
    tl.store(out + place, (value * share).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "turns"])
def gelu_backward(
    x, upstream, parts, rows, turns, columns,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, AGAIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`upstream` becomes the gradient of x, if AGAIN x its GELU; `parts` (P, columns) the sums."""
    program = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        row = ((turns - 1 - turn) * tl.num_programs(1) + program) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(upstream + place, mask=mask, other=0.0).to(tl.float32)
        square = value * value
        # The GELU is value * share, and share the logistic function of a cubic of value.
        share = 1.0 / (1.0 + tl.exp2(value * (TWICE + TWICE * 0.044715 * square) * -LOG2_E))
        slope = TWICE + 3.0 * TWICE * 0.044715 * square
        dx = dy * (share + (share - share * share) * value * slope)
        narrow = dx.to(upstream.dtype.element_ty)
        tl.store(upstream + place, narrow, mask=mask)
        if AGAIN:
            tl.store(x + place, (value * share).to(x.dtype.element_ty), mask=mask)
        total += tl.sum(narrow.to(tl.float32), 0)
    tl.store(parts + program.to(tl.int64) * columns + column, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def pack(q, k, v, out, parts, rows, each, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """`out` (rows, 3 * columns) is q, k and v side by side; `parts` (P, 3 * columns) its sums."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    third = tl.program_id(2)
    source = q
    if third == 1:
        source = k
    if third == 2:
        source = v
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(program * each + each, rows)
    for begin in range(0, each, ROWS):
        row = program * each + begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        far = row.to(tl.int64)[:, None]
        value = tl.load(source + far * columns + column[None, :], mask=mask, other=0.0)
        place = far * 3 * columns + third * columns + column[None, :]
        tl.store(out + place, value, mask=mask)
        total += tl.sum(value.to(tl.float32), 0)
    own = parts + program.to(tl.int64) * 3 * columns + third * columns + column
    tl.store(own, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "each"])
def column_sums(x, parts, rows, each, columns, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """`parts` (P, columns): each program's sum over its rows of x (rows, columns)."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(program * each + each, rows)
    for begin in range(0, each, ROWS):
        row = program * each + begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.sum(tl.load(x + place, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(parts + program.to(tl.int64) * columns + column, total, mask=inside)


@triton.jit(
    do_not_specialize=["count_a", "count_b", "count_c", "count_d", "end_a", "end_b", "end_c"]
)
def add_parts(
    parts_a, out_a, count_a, columns_a, stride_a,
    parts_b, out_b, count_b, columns_b, stride_b,
    parts_c, out_c, count_c, columns_c, stride_c,
    parts_d, out_d, count_d, columns_d, stride_d,
    end_a, end_b, end_c,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each `out` (columns) grows by the sum of its `parts`, `count` rows `stride` apart.

    The programs before `end_a` serve the first of them, those before `end_b` the second, and so on.
    """
    program = tl.program_id(0)
    parts, out, count, columns, stride = parts_a, out_a, count_a, columns_a, stride_a
    own = program
    if program >= end_a:
        parts, out, count, columns, stride = parts_b, out_b, count_b, columns_b, stride_b
        own = program - end_a
    if program >= end_b:
        parts, out, count, columns, stride = parts_c, out_c, count_c, columns_c, stride_c
        own = program - end_b
    if program >= end_c:
        parts, out, count, columns, stride = parts_d, out_d, count_d, columns_d, stride_d
        own = program - end_c
    column = own * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.sum(
            tl.load(parts + row[:, None] * stride + column[None, :], mask=mask, other=0.0), 0
        )
    tl.store(out + column, tl.load(out + column, mask=inside, other=0.0) + total, mask=inside)
