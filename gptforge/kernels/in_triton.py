"""The kernels themselves, in Triton. Imported only where one is about to run.

The modules beside this one say what each computes, and have the plain torch for it. Rows are
tokens, columns channels. Sums over the rows are made in two steps, so that their order, and with it
every bit, is the same each time: each program leaves what it saw in a row of `parts`.
"""

import triton
import triton.language as tl

from gptforge.kernels.in_triton_dropout import column_words, factor_of, is_kept, row_words

LOG2_E = tl.constexpr(1.4426950408889634)
"""A GPU has an instruction for powers of two."""


@triton.jit(do_not_specialize=["ignore", "rows", "programs"])
def cross_entropy(
    logits, targets, losses, stride, ignore, scale, rows, programs,
    columns: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's loss, and its gradient, times what is at `scale`, in its place.

    A program takes one row after the other. There are few programs, so that the rows they are at
    stay in the cache for the second look.
    """
    for row in range(tl.program_id(0), rows, programs):
        start = logits + row * stride.to(tl.int64)
        _cross_entropy_of_a_row(start, targets + row, losses + row, ignore, scale, columns, BLOCK)


@triton.jit
def _cross_entropy_of_a_row(
    start, target_at, loss_at, ignore, scale, columns: tl.constexpr, BLOCK: tl.constexpr
):
    target = tl.load(target_at)
    # Each thread goes over its own eighths of the row, with a maximum and a sum of its own: threads
    # that waited for each other in every block would take half as long again.
    top = tl.full((BLOCK // 8,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK // 8,), tl.float32)
    WHOLE: tl.constexpr = columns // BLOCK * BLOCK
    for begin in range(0, WHOLE, BLOCK):
        top, total = _more_of_a_row(start, begin, top, total, columns, BLOCK, False)
    if columns > WHOLE:
        top, total = _more_of_a_row(start, WHOLE, top, total, columns, BLOCK, True)
    highest = tl.max(top, 0)
    sum_of_all = tl.sum(total * tl.exp2((top - highest) * LOG2_E), 0)
    counts = target != ignore
    chosen = tl.where(counts, target, 0)
    right = tl.load(start + chosen).to(tl.float32)
    tl.store(loss_at, tl.where(counts, tl.log(sum_of_all) + (highest - right), 0.0))
    weight = tl.where(counts, tl.load(scale), 0.0)
    # The gradient's size as a power of two; none at all where the row does not count.
    level = tl.log2(sum_of_all) - tl.log2(weight)
    # The target's own column is read above before any thread may write it.
    tl.debug_barrier()
    for begin in range(0, WHOLE, BLOCK):
        _gradient_of_a_row(start, begin, highest, level, columns, BLOCK, False)
    if columns > WHOLE:
        _gradient_of_a_row(start, WHOLE, highest, level, columns, BLOCK, True)
    tl.debug_barrier()
    own = tl.exp2((right - highest) * LOG2_E - level) - weight
    tl.store(start + chosen, own.to(start.dtype.element_ty))


@triton.jit
def _more_of_a_row(
    start, begin, top, total, columns: tl.constexpr, BLOCK: tl.constexpr, IS_LAST: tl.constexpr
):
    place = begin + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if IS_LAST:
        inside = place < columns
        x = tl.load(start + place, inside, -float("inf"), eviction_policy="evict_last")
    else:
        x = tl.load(start + place, eviction_policy="evict_last")
    x = x.to(tl.float32)
    higher = tl.maximum(top, tl.max(x, 1))
    more = tl.sum(tl.exp2((x - higher[:, None]) * LOG2_E), 1)
    return higher, total * tl.exp2((top - higher) * LOG2_E) + more


@triton.jit
def _gradient_of_a_row(
    start, begin, highest, level,
    columns: tl.constexpr, BLOCK: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    place = begin + tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = place < columns if IS_LAST else None
    x = tl.load(start + place, inside, eviction_policy="evict_first").to(tl.float32)
    gradient = tl.exp2((x - highest) * LOG2_E - level).to(start.dtype.element_ty)
    tl.store(start + place, gradient, inside, cache_modifier=".cs")


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


@triton.jit(do_not_specialize=["rows", "each"])
def norm_backward(
    upstream, stream, mean, rstd, weight, beside, to_branch, parts, keys, rows, each,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BESIDE: tl.constexpr,
    DROPPED: tl.constexpr,
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
    last = tl.minimum(program * each + each, rows)
    for begin in range(0, each, ROWS):
        row = program * each + begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        dy = tl.load(upstream + place, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(stream + place, mask=mask, other=0.0).to(tl.float32)
        average = tl.load(mean + row, mask=row < last, other=0.0)[:, None]
        inverse = tl.load(rstd + row, mask=row < last, other=0.0)[:, None]
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
    inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
    # (1 + tanh(a)) / 2 is the logistic function of 2 a.
    share = 1.0 / (1.0 + tl.exp(-2.0 * inner))
    tl.store(out + place, (value * share).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each"])
def gelu_backward(
    x, upstream, parts, rows, each, columns,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """`upstream` becomes the gradient of x, if AGAIN x its GELU; `parts` (P, columns) the sums."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum(program * each + each, rows)
    for begin in range(0, each, ROWS):
        row = program * each + begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(upstream + place, mask=mask, other=0.0).to(tl.float32)
        square = value * value
        inner = 0.7978845608028654 * value * (1.0 + 0.044715 * square)
        share = 1.0 / (1.0 + tl.exp(-2.0 * inner))
        slope = 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * square)
        dx = dy * (share + value * share * (1.0 - share) * slope)
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


@triton.jit(do_not_specialize=["count", "columns"])
def add_parts(parts, out, count, columns, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """`out` (columns) grows by the sum of `parts`, `count` rows `stride` apart."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, count, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & inside[None, :]
        total += tl.sum(
            tl.load(parts + row[:, None] * stride + column[None, :], mask=mask, other=0.0), 0
        )
    tl.store(out + column, tl.load(out + column, mask=inside, other=0.0) + total, mask=inside)
