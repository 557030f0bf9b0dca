"""The way back through causal attention, in Triton. Imported only where it is about to run.

packed_attention.py says what it computes. After FlashAttention-2 (Dao, 2023): scores are made again
block by block, from the softmax's sums that the way forward has kept. One kernel goes over the
queries, another one over the keys; nothing is added up across programs, so that every bit is the
same each time. Triton's own tutorial on attention goes the same way.

Shapes: T tokens of a window, H heads of D channels, C = H * D. q, k and v lie side by side, 3 * C
numbers a token, and so do their gradients.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""A GPU has an instruction for powers of two."""


@triton.jit
def to_queries(
    qkv, out, upstream, lse, delta, gradient, parts, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
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
    keys = qkv + own + C
    factor = scale * LOG2_E
    dq = _over_keys(
        dq, q, up, sums, level, keys, m, 0, block * BLOCK, length, factor,
        C, D, BLOCK, False, IS_EVEN,
    )  # fmt: skip
    dq = _over_keys(
        dq, q, up, sums, level, keys, m, block * BLOCK, block * BLOCK + BLOCK, length, factor,
        C, D, BLOCK, True, IS_EVEN,
    )  # fmt: skip
    narrow = (dq * scale).to(gradient.dtype.element_ty)
    tl.store(gradient + packed, narrow, mask=rows)
    part = parts + (window * blocks + block).to(tl.int64) * 3 * C + head * D + d
    tl.store(part, tl.sum(tl.where(rows, narrow.to(tl.float32), 0.0), 0))


@triton.jit
def _over_keys(
    dq, q, up, sums, level, keys, m, start, stop, length, factor,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    for begin in range(start, stop, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        place = n[:, None] * 3 * C + d[None, :]
        if IS_EVEN:
            k = tl.load(keys + place)
            v = tl.load(keys + C + place)
        else:
            k = tl.load(keys + place, mask=(n < length)[:, None], other=0.0)
            v = tl.load(keys + C + place, mask=(n < length)[:, None], other=0.0)
        shares = tl.exp2(tl.dot(q, tl.trans(k)) * factor - sums[:, None])
        if IS_DIAGONAL:
            shares = tl.where(n[None, :] <= m[:, None], shares, 0.0)
        slope = shares * (tl.dot(up, tl.trans(v)) - level[:, None])
        dq = tl.dot(slope.to(k.dtype), k, dq)
    return dq


@triton.jit
def to_keys(
    qkv, upstream, lse, delta, gradient, parts, length, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
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
    dk, dv = _over_queries(
        dk, dv, k, v, queries, ups, lse + row, delta + row, n, block * BLOCK,
        block * BLOCK + BLOCK, length, factor, C, D, BLOCK, True, IS_EVEN,
    )  # fmt: skip
    dk, dv = _over_queries(
        dk, dv, k, v, queries, ups, lse + row, delta + row, n, block * BLOCK + BLOCK,
        length, length, factor, C, D, BLOCK, False, IS_EVEN,
    )  # fmt: skip
    narrow_k = (dk * scale).to(gradient.dtype.element_ty)
    narrow_v = dv.to(gradient.dtype.element_ty)
    tl.store(gradient + place, narrow_k, mask=rows)
    tl.store(gradient + C + place, narrow_v, mask=rows)
    part = parts + (window * tl.num_programs(0) + block).to(tl.int64) * 3 * C + C + head * D + d
    tl.store(part, tl.sum(tl.where(rows, narrow_k.to(tl.float32), 0.0), 0))
    tl.store(part + C, tl.sum(tl.where(rows, narrow_v.to(tl.float32), 0.0), 0))


@triton.jit
def _over_queries(
    dk, dv, k, v, queries, ups, lse, delta, n, start, stop, length, factor,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, D)
    for begin in range(start, stop, BLOCK):
        m = begin + tl.arange(0, BLOCK)
        if IS_EVEN:
            q = tl.load(queries + m[:, None] * 3 * C + d[None, :])
            up = tl.load(ups + m[:, None] * C + d[None, :])
            sums = tl.load(lse + m)
            level = tl.load(delta + m)
        else:
            inside = m < length
            q = tl.load(queries + m[:, None] * 3 * C + d[None, :], mask=inside[:, None], other=0.0)
            up = tl.load(ups + m[:, None] * C + d[None, :], mask=inside[:, None], other=0.0)
            sums = tl.load(lse + m, mask=inside, other=0.0)
            level = tl.load(delta + m, mask=inside, other=0.0)
        # Scores the other way round: (keys, queries).
        shares = tl.exp2(tl.dot(k, tl.trans(q)) * factor - (sums * LOG2_E)[None, :])
        if IS_DIAGONAL:
            shares = tl.where(n[:, None] <= m[None, :], shares, 0.0)
        if not IS_EVEN:
            shares = tl.where((m < length)[None, :], shares, 0.0)
        dv = tl.dot(shares.to(up.dtype), up, dv)
        slope = shares * (tl.dot(v, tl.trans(up)) - level[None, :])
        dk = tl.dot(slope.to(q.dtype), q, dk)
    return dk, dv
