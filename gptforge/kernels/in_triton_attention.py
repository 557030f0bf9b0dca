"""Causal attention with dropout, and its way back, in Triton. Imported where it is about to run.

packed_attention.py says what it computes. After FlashAttention-2 (Dao, 2023): on the way back
scores are made again block by block, from the softmax's sums that the way forward has kept; once
over the keys for the gradient of the queries, once over the queries for those of keys and values.
Nothing is added up across programs, so that every bit is the same each time. Triton's own tutorial
on attention goes the same way.

Shapes: T tokens of a window, H heads of D channels, C = H * D. q, k and v lie side by side, 3 * C
numbers a token, and so do their gradients.
"""

import triton
import triton.language as tl

from gptforge.kernels.in_triton_dropout import (
    column_words,
    factor_of,
    is_kept,
    row_words,
)

LOG2_E = tl.constexpr(1.4426950408889634)
"""A GPU has an instruction for powers of two."""


@triton.jit
def forward(
    qkv, out, lse, keys, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """`out` (N, C), and `lse` (B, H, T), the logarithms of the softmax's sums."""
    C: tl.constexpr = H * D
    # The last block has the most keys: it begins first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, window = tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)
    m = block * BLOCK + tl.arange(0, BLOCK)
    start = window.to(tl.int64) * length
    own = qkv + start * 3 * C + head * D
    q = _rows(own, m, 3 * C, length, D, IS_EVEN)
    row = (window * H + head) * length + m
    words = row_words(row, keys) if DROPPED else m
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mix = tl.zeros((BLOCK, D), tl.float32)
    top, total, mix = _mix(
        top, total, mix, q, own + C, words, keys, m, 0, block * BLOCK, length, scale * LOG2_E,
        C, D, BLOCK, False, IS_EVEN, DROPPED,
    )  # fmt: skip
    top, total, mix = _mix(
        top, total, mix, q, own + C, words, keys, m, block * BLOCK, block * BLOCK + BLOCK, length,
        scale * LOG2_E, C, D, BLOCK, True, IS_EVEN, DROPPED,
    )  # fmt: skip
    if DROPPED:
        mix *= factor_of(DROPPED)
    place = start * C + head * D + m[:, None] * C + d[None, :]
    narrow = (mix / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + place, narrow, mask=(m < length)[:, None])
    tl.store(lse + row, (top + tl.log2(total)) / LOG2_E, mask=m < length)


@triton.jit
def _mix(
    top, total, mix, q, packed, words, keys, m, start, stop, length, factor,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    for begin in range(start, stop, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        k = _rows(packed, n, 3 * C, length, D, IS_EVEN)
        v = _rows(packed + C, n, 3 * C, length, D, IS_EVEN)
        scores = tl.dot(q, tl.trans(k)) * factor
        if IS_DIAGONAL:
            scores = tl.where(n[None, :] <= m[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(shares, 1)
        if DROPPED:
            shares = tl.where(
                is_kept(words[:, None], column_words(n, keys)[None, :], DROPPED), shares, 0.0
            )
        mix = tl.dot(shares.to(v.dtype), v, mix * shrink[:, None])
        top = higher
    return top, total, mix


@triton.jit
def to_queries(
    qkv, out, upstream, lse, delta, gradient, parts, keys, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries; `delta` (B, H, T), what softmax's way back takes off.

    `parts` (P, 3 * C) gets the gradient's sums over the block's tokens, in the first C columns.
    """
    C: tl.constexpr = H * D
    blocks = tl.num_programs(0)
    # The last block has the most keys: it begins first.
    block = blocks - 1 - tl.program_id(0)
    head = tl.program_id(1)
    window = tl.program_id(2)
    d = tl.arange(0, D)
    m = block * BLOCK + tl.arange(0, BLOCK)
    inside = m < length
    rows = inside[:, None]
    start = window.to(tl.int64) * length
    own = start * 3 * C + head * D
    packed = own + m[:, None] * 3 * C + d[None, :]
    place = start * C + head * D + m[:, None] * C + d[None, :]
    q = tl.load(qkv + packed, mask=rows, other=0.0)
    up = tl.load(upstream + place, mask=rows, other=0.0)
    y = tl.load(out + place, mask=rows, other=0.0)
    row = (window * H + head) * length + m
    sums = tl.load(lse + row, mask=inside, other=0.0) * LOG2_E
    level = tl.sum(y.to(tl.float32) * up.to(tl.float32), 1)
    tl.store(delta + row, level, mask=inside)
    dq = tl.zeros((BLOCK, D), tl.float32)
    words = row_words(row, keys) if DROPPED else m
    packed_keys = qkv + own + C
    factor = scale * LOG2_E
    dq = _over_keys(
        dq, q, up, sums, level, packed_keys, words, keys, m, 0, block * BLOCK, length, factor,
        C, D, BLOCK, False, IS_EVEN, DROPPED,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, up, sums, level, packed_keys, words, keys, m, block * BLOCK,
        block * BLOCK + BLOCK, length, factor, C, D, BLOCK, True, IS_EVEN, DROPPED,
    )  # fmt: skip
    narrow = (dq * scale).to(gradient.dtype.element_ty)
    tl.store(gradient + packed, narrow, mask=rows)
    part = parts + (window * blocks + block).to(tl.int64) * 3 * C + head * D + d
    tl.store(part, tl.sum(tl.where(rows, narrow.to(tl.float32), 0.0), 0))


@triton.jit
def _over_keys(
    dq, q, up, sums, level, packed, words, keys, m, start, stop, length, factor,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    for begin in range(start, stop, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        place = n[:, None] * 3 * C + d[None, :]
        if IS_EVEN:
            k = tl.load(packed + place)
            v = tl.load(packed + C + place)
        else:
            k = tl.load(packed + place, mask=(n < length)[:, None], other=0.0)
            v = tl.load(packed + C + place, mask=(n < length)[:, None], other=0.0)
        shares = tl.exp2(tl.dot(q, tl.trans(k)) * factor - sums[:, None])
        if IS_DIAGONAL:
            shares = tl.where(n[None, :] <= m[:, None], shares, 0.0)
        to_shares = tl.dot(up, tl.trans(v))
        if DROPPED:
            stays = is_kept(words[:, None], column_words(n, keys)[None, :], DROPPED)
            to_shares = tl.where(stays, to_shares * factor_of(DROPPED), 0.0)
        slope = shares * (to_shares - level[:, None])
        dq = tl.dot(slope.to(k.dtype), k, dq)
    return dq


@triton.jit
def to_keys(
    qkv, upstream, lse, delta, gradient, parts, keys, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPPED: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, and their sums, behind those of the queries."""
    C: tl.constexpr = H * D
    block = tl.program_id(0)
    head = tl.program_id(1)
    window = tl.program_id(2)
    d = tl.arange(0, D)
    n = block * BLOCK + tl.arange(0, BLOCK)
    rows = (n < length)[:, None]
    start = window.to(tl.int64) * length
    own = start * 3 * C + head * D
    place = own + C + n[:, None] * 3 * C + d[None, :]
    k = tl.load(qkv + place, mask=rows, other=0.0)
    v = tl.load(qkv + C + place, mask=rows, other=0.0)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    queries = qkv + own
    ups = upstream + start * C + head * D
    row = (window * H + head) * length
    factor = scale * LOG2_E
    words = column_words(n, keys) if DROPPED else n
    dk, dv = _over_queries(
        dk, dv, k, v, queries, ups, lse, delta, words, keys, row, n, block * BLOCK,
        block * BLOCK + BLOCK, length, factor, C, D, BLOCK, True, IS_EVEN, DROPPED,
    )  # fmt: skip
    dk, dv = _over_queries(
        dk, dv, k, v, queries, ups, lse, delta, words, keys, row, n, block * BLOCK + BLOCK,
        length, length, factor, C, D, BLOCK, False, IS_EVEN, DROPPED,
    )  # fmt: skip
    if DROPPED:
        dv *= factor_of(DROPPED)
    narrow_k = (dk * scale).to(gradient.dtype.element_ty)
    narrow_v = dv.to(gradient.dtype.element_ty)
    tl.store(gradient + place, narrow_k, mask=rows)
    tl.store(gradient + C + place, narrow_v, mask=rows)
    part = parts + (window * tl.num_programs(0) + block).to(tl.int64) * 3 * C + C + head * D + d
    tl.store(part, tl.sum(tl.where(rows, narrow_k.to(tl.float32), 0.0), 0))
    tl.store(part + C, tl.sum(tl.where(rows, narrow_v.to(tl.float32), 0.0), 0))


@triton.jit
def _over_queries(
    dk, dv, k, v, queries, ups, lse, delta, words, keys, row, n, start, stop, length, factor,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    for begin in range(start, stop, BLOCK):
        m = begin + tl.arange(0, BLOCK)
        if IS_EVEN:
            q = tl.load(queries + m[:, None] * 3 * C + d[None, :])
            up = tl.load(ups + m[:, None] * C + d[None, :])
            sums = tl.load(lse + row + m)
            level = tl.load(delta + row + m)
        else:
            inside = m < length
            q = tl.load(queries + m[:, None] * 3 * C + d[None, :], mask=inside[:, None], other=0.0)
            up = tl.load(ups + m[:, None] * C + d[None, :], mask=inside[:, None], other=0.0)
            sums = tl.load(lse + row + m, mask=inside, other=0.0)
            level = tl.load(delta + row + m, mask=inside, other=0.0)
        # Scores the other way round: (keys, queries).
        shares = tl.exp2(tl.dot(k, tl.trans(q)) * factor - (sums * LOG2_E)[None, :])
        if IS_DIAGONAL:
            shares = tl.where(n[:, None] <= m[None, :], shares, 0.0)
        if not IS_EVEN:
            shares = tl.where((m < length)[None, :], shares, 0.0)
        to_shares = tl.dot(v, tl.trans(up))
        still = shares
        if DROPPED:
            stays = is_kept(row_words(row + m, keys)[None, :], words[:, None], DROPPED)
            to_shares = tl.where(stays, to_shares * factor_of(DROPPED), 0.0)
            still = tl.where(stays, shares, 0.0)
        dv = tl.dot(still.to(up.dtype), up, dv)
        slope = shares * (to_shares - level[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _rows(start, rows, stride, length, D: tl.constexpr, IS_EVEN: tl.constexpr):
    """Rows of D numbers; noughts behind the window's last token."""
    place = start + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if IS_EVEN:
        return tl.load(place)
    else:
        return tl.load(place, mask=(rows < length)[:, None], other=0.0)
