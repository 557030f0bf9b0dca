"""The loss and its gradient in the logits' place, in Triton. Imported where it is about to run.

head.py says what it computes, and has the plain torch for it.
"""

import triton
import triton.language as tl

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
    # Each thread has eight columns of a block, and a maximum and a sum of its own: threads that
    # waited for each other in every block would take half as long again.
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
def _eights(columns: tl.constexpr, BLOCK: tl.constexpr):
    """Eight columns for each thread: side by side where a load can take them at once."""
    thread, its = tl.arange(0, BLOCK // 8)[:, None], tl.arange(0, 8)[None, :]
    if columns % 8 == 0:
        return thread * 8 + its
    else:
        return thread + its * (BLOCK // 8)


@triton.jit
def _more_of_a_row(
    start, begin, top, total, columns: tl.constexpr, BLOCK: tl.constexpr, IS_LAST: tl.constexpr
):
    place = begin + _eights(columns, BLOCK)
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
    place = begin + _eights(columns, BLOCK)
    inside = place < columns if IS_LAST else None
    x = tl.load(start + place, inside, eviction_policy="evict_first").to(tl.float32)
    gradient = tl.exp2((x - highest) * LOG2_E - level).to(start.dtype.element_ty)
    tl.store(start + place, gradient, inside, cache_modifier=".cs")
