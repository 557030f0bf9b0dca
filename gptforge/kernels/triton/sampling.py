"""Kernels of top-k sampling; see `gptforge.kernels.sampling`.

Two rounds, each exact: the k largest logits are in the k groups with the largest maxima, so the
first round selects groups by their maxima, the second one logits of these groups. Without a sort:
a round bisects for the k-th largest value, counting what is above, and 256 of 50,257 logits remain.

Shapes: B sequences (program_id(0) is one of them), V logits in M groups of GROUP, N steps.
"""

import triton
import triton.language as tl

from gptforge.kernels.triton.decode import _wait


@triton.jit
def group_max(
    logits,  # (B, V) fp32
    maxima,  # (B, M) fp32
    counters,  # (2,) int64, advanced here: no other program of this kernel reads them
    stride_b, columns, groups,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Maximum of each group of neighboring logits; also advances the counters."""
    pid_b = tl.program_id(0)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    _wait(PDL)
    value = tl.load(
        logits + pid_b.to(tl.int64) * stride_b + column, mask=column < columns, other=-float("inf")
    )
    tl.store(maxima + pid_b * groups + group, tl.max(value, 1), mask=group < groups)
    if (pid_b == 0) & (tl.program_id(1) == 0):
        counter = counters + tl.arange(0, 2)
        tl.store(counter, tl.load(counter) + 1)


@triton.jit
def sample_top_k(
    logits, maxima,  # (B, V) and (B, M) fp32
    uniforms, counters,  # (B, N) fp32 in [0, 1), and (2,) int64, already advanced
    top_ids, top_logits,  # (B, BLOCK_K), scratch
    ids, token_ids,  # (B,) and (B, N, ...) int64, written
    temperature, top_p, top_k, top_groups, stride_b, stride_uniforms, stride_b_ids, stride_step,
    columns, groups,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sample from softmax(top-k of logits / temperature), cut by top-p."""
    pid_b = tl.program_id(0)
    logits += pid_b.to(tl.int64) * stride_b
    top_ids += pid_b * BLOCK_K
    top_logits += pid_b * BLOCK_K
    group = tl.arange(0, BLOCK_M)
    _wait(PDL)
    step_index = tl.load(counters) - 1
    uniform = tl.load(uniforms + pid_b * stride_uniforms + step_index)
    value = tl.load(maxima + pid_b * groups + group, mask=group < groups, other=-float("inf"))
    n = _store_top_k(value, group, top_groups, top_logits, top_ids)

    member = tl.arange(0, BLOCK_K * GROUP)
    in_top = member // GROUP < n
    column = tl.load(top_ids + member // GROUP, mask=in_top, other=0) * GROUP + member % GROUP
    value = tl.load(logits + column, mask=in_top & (column < columns), other=-float("inf"))
    tl.debug_barrier()  # all have read the groups, which are overwritten
    n = _store_top_k(value, column, top_k, top_logits, top_ids)

    rank = tl.arange(0, BLOCK_K)
    logit = tl.load(top_logits + rank, mask=rank < n, other=-float("inf"))
    largest = tl.max(logit, 0)
    prob = tl.exp((logit - largest) / temperature)  # not yet divided by their sum
    # Probability of this and all larger logits; among equal ones, the first is the largest.
    before = tl.zeros((BLOCK_K, TILE), tl.float32)  # added up across threads once, at the end
    for start in tl.static_range(0, BLOCK_K, TILE):
        other = start + tl.arange(0, TILE)
        other_logit = tl.load(top_logits + other, mask=other < n, other=-float("inf"))
        other_prob = tl.exp((other_logit - largest) / temperature)
        is_before = other_logit[None, :] > logit[:, None]
        is_before |= (other_logit[None, :] == logit[:, None]) & (other[None, :] <= rank[:, None])
        before += tl.where(is_before, other_prob[None, :], 0.0)
    cdf = tl.sum(before, 1)
    is_kept = (rank < n) & (cdf - prob < top_p * tl.max(cdf, 0))
    total = tl.max(tl.where(is_kept, cdf, 0.0), 0)
    # Inversion. `uniform * total` may round to `total`: then the last token.
    is_reached = is_kept & ((cdf > uniform * total) | (cdf == total))
    first = tl.max(tl.where(is_reached, logit, -float("inf")), 0)
    chosen = tl.min(tl.where(is_reached & (logit == first), rank, BLOCK_K - 1), 0)
    token = tl.load(top_ids + chosen, mask=chosen < n, other=0).to(tl.int64)
    tl.store(ids + pid_b, token)
    tl.store(token_ids + pid_b * stride_b_ids + step_index * stride_step, token)


@triton.jit
def _store_top_k(value, index, k, out_values, out_indices):
    """Store the k largest finite values and their indices; returns their number.

    Among equal values the first are taken.
    """
    is_finite = value > -float("inf")
    high = tl.max(value, 0)
    low = tl.min(tl.where(is_finite, value, high), 0)
    # Counts are below 2^15, so one reduction adds several of them, 16 bits each.
    packed = tl.sum((value >= low).to(tl.int32) + ((value == high).to(tl.int32) << 16), 0)
    # Invariant: at least k values are >= low, fewer are >= high.
    low = tl.where(packed >> 16 >= k, high, low)
    count = packed & 0xFFFF
    middle = 0.5 * low + 0.5 * high
    while (count > k) & (low < middle) & (middle < high):
        lower, upper = 0.5 * low + 0.5 * middle, 0.5 * middle + 0.5 * high
        counts = (value >= lower).to(tl.int64) + ((value >= middle).to(tl.int64) << 16)
        counts = tl.sum(counts + ((value >= upper).to(tl.int64) << 32), 0)
        above_lower = (counts & 0xFFFF).to(tl.int32)
        above_middle = (counts >> 16 & 0xFFFF).to(tl.int32)
        above_upper = (counts >> 32).to(tl.int32)
        if above_upper >= k:
            low, count = upper, above_upper
        elif above_middle >= k:
            low, high, count = middle, upper, above_middle
        elif above_lower >= k:
            low, high, count = lower, middle, above_lower
        else:
            high = lower
        middle = 0.5 * low + 0.5 * high
    # No value lies between low and high now, unless there are exactly k from low on.
    above = value > low
    equal = value == low
    ranks = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    num_above = tl.sum(above.to(tl.int32), 0)
    position = tl.where(above, (ranks & 0xFFFF) - 1, num_above + (ranks >> 16) - 1)
    is_stored = (above | equal) & (position < k)
    tl.store(out_values + position, value, mask=is_stored)
    tl.store(out_indices + position, index, mask=is_stored)
    tl.debug_barrier()  # other threads load them
    return tl.minimum(count, k)
