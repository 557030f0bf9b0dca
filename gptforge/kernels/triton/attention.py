"""FlashAttention-2 (Dao, 2023) on packed q, k, v, with dropout; see `gptforge.kernels.attention`.

The forward saves only the log-sum-exp of each row of scores. The backward recomputes probabilities
tile by tile: `attn_bwd_dq` loops over keys, `attn_bwd_dkdv` over queries. One kernel for both would
save two of seven matmuls, but has to accumulate dq across programs, with atomics.

Names are those of Triton's fused attention tutorial: m_i and l_i are the running maximum and sum of
the softmax, p the probabilities, ds the gradient of the scores. With s = scale * q @ k.T:
dv = p.T @ do, dp = do @ v.T, delta = rowsum(o * do), ds = p * (dp - delta), dq = scale * ds @ k,
dk = scale * ds.T @ q (FlashAttention-2, section 3.1).

Shapes: T `length` tokens of a sequence, H heads of D channels, C = H * D. q, k and v of a token lie
side by side, 3 * C elements, and so do their gradients.
"""

import triton
import triton.language as tl

from gptforge.kernels.triton.dropout import hash_columns, hash_rows, is_kept, load_rate
from gptforge.kernels.triton.gelu import LOG2_E


@triton.jit
def attn_fwd(
    qkv,  # (B, T, 3, H, D)
    out,  # (B, T, H, D)
    lse,  # (B, H, T) fp32, log-sum-exp of the scores
    seeds,  # (4,) int32, see `DropoutSeed`
    length, scale, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of BLOCK queries of one head."""
    C: tl.constexpr = H * D
    # The causal mask leaves the last tile the most keys: start it first, so that it does not run
    # alone at the end.
    block_m = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    offs_d = tl.arange(0, D)
    offs_m = block_m * BLOCK + tl.arange(0, BLOCK)
    start = batch.to(tl.int64) * length
    q_ptr = qkv + start * 3 * C + head * D
    q = _load_rows(q_ptr, offs_m, 3 * C, length, D, IS_EVEN)  # (BLOCK, D)
    row = (batch * H + head) * length + offs_m
    row_hash = hash_rows(row, seeds) if DROPOUT else offs_m
    m_i = tl.full((BLOCK,), -float("inf"), tl.float32)
    l_i = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    # Tiles below the diagonal need no mask; the scale is log2(e) times as large, for exp2.
    m_i, l_i, acc = _attn_fwd_inner(
        m_i, l_i, acc, q, q_ptr + C, row_hash, seeds, offs_m, 0, block_m * BLOCK, length,
        scale * LOG2_E, C, D, BLOCK, False, IS_EVEN, DROPOUT,
    )  # fmt: skip
    m_i, l_i, acc = _attn_fwd_inner(
        m_i, l_i, acc, q, q_ptr + C, row_hash, seeds, offs_m, block_m * BLOCK,
        block_m * BLOCK + BLOCK, length, scale * LOG2_E, C, D, BLOCK, True, IS_EVEN, DROPOUT,
    )  # fmt: skip
    if DROPOUT:
        acc *= load_rate(seeds)[1]
    offset = start * C + head * D + offs_m[:, None] * C + offs_d[None, :]
    o = (acc / l_i[:, None]).to(out.dtype.element_ty)
    tl.store(out + offset, o, mask=(offs_m < length)[:, None])
    # m_i is in units of log2; the LSE is stored as cuDNN returns it, in natural units.
    tl.store(lse + row, (m_i + tl.log2(l_i)) / LOG2_E, mask=offs_m < length)


@triton.jit
def _attn_fwd_inner(
    m_i, l_i, acc, q, k_ptr, row_hash, seeds, offs_m, start, stop, length, qk_scale,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    for start_n in range(start, stop, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        k = _load_rows(k_ptr, offs_n, 3 * C, length, D, IS_EVEN)
        v = _load_rows(k_ptr + C, offs_n, 3 * C, length, D, IS_EVEN)
        qk = tl.dot(q, tl.trans(k)) * qk_scale  # (queries, keys)
        if IS_DIAGONAL:
            # Masks keys past the end of the sequence too: their index is above that of any query.
            qk = tl.where(offs_n[None, :] <= offs_m[:, None], qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.exp2(qk - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        # The sum is that of the softmax: dropout comes after it, so only `acc` sees the mask.
        l_i = l_i * alpha + tl.sum(p, 1)
        if DROPOUT:
            rate = load_rate(seeds)
            keep = is_kept(row_hash[:, None], hash_columns(offs_n, seeds)[None, :], rate)
            p = tl.where(keep, p, 0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def attn_bwd_dq(
    qkv,  # (B, T, 3, H, D)
    out, grad_output,  # (B, T, H, D)
    lse,  # (B, H, T) fp32
    delta,  # (B, H, T) fp32, written: sum of out * grad_output over D
    grad_qkv,  # (B, T, 3, H, D), its queries are written
    partials,  # (B * blocks, 3, H, D) fp32, sums of grad_qkv over a tile's tokens
    seeds,  # (4,) int32, see `DropoutSeed`
    length, scale, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK queries of one head."""
    C: tl.constexpr = H * D
    blocks = tl.num_programs(0)
    # Most keys first, as in the forward.
    block_m = blocks - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    offs_d = tl.arange(0, D)
    offs_m = block_m * BLOCK + tl.arange(0, BLOCK)
    in_sequence = offs_m < length
    mask = in_sequence[:, None]
    start = batch.to(tl.int64) * length
    head_offset = start * 3 * C + head * D
    q_offset = head_offset + offs_m[:, None] * 3 * C + offs_d[None, :]
    o_offset = start * C + head * D + offs_m[:, None] * C + offs_d[None, :]
    q = tl.load(qkv + q_offset, mask=mask, other=0.0)
    do = tl.load(grad_output + o_offset, mask=mask, other=0.0)
    o = tl.load(out + o_offset, mask=mask, other=0.0)
    row = (batch * H + head) * length + offs_m
    lse_i = tl.load(lse + row, mask=in_sequence, other=0.0) * LOG2_E
    # rowsum(o * do) equals rowsum(p * dp), with dropout too, without reading all keys first.
    delta_i = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + row, delta_i, mask=in_sequence)
    dq = tl.zeros((BLOCK, D), tl.float32)
    row_hash = hash_rows(row, seeds) if DROPOUT else offs_m
    k_ptr = qkv + head_offset + C
    qk_scale = scale * LOG2_E
    dq = _attn_bwd_dq_inner(
        dq, q, do, lse_i, delta_i, k_ptr, row_hash, seeds, offs_m, 0, block_m * BLOCK, length,
        qk_scale, C, D, BLOCK, False, IS_EVEN, DROPOUT,
    )  # fmt: skip
    dq = _attn_bwd_dq_inner(
        dq, q, do, lse_i, delta_i, k_ptr, row_hash, seeds, offs_m, block_m * BLOCK,
        block_m * BLOCK + BLOCK, length, qk_scale, C, D, BLOCK, True, IS_EVEN, DROPOUT,
    )  # fmt: skip
    # The bias gradient sums the rounded values, as a sum over the stored tensor would.
    rounded = (dq * scale).to(grad_qkv.dtype.element_ty)
    tl.store(grad_qkv + q_offset, rounded, mask=mask)
    partial = partials + (batch * blocks + block_m).to(tl.int64) * 3 * C + head * D + offs_d
    tl.store(partial, tl.sum(tl.where(mask, rounded.to(tl.float32), 0.0), 0))


@triton.jit
def _attn_bwd_dq_inner(
    dq, q, do, lse_i, delta_i, k_ptr, row_hash, seeds, offs_m, start, stop, length, qk_scale,
    C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    for start_n in range(start, stop, BLOCK):
        offs_n = start_n + tl.arange(0, BLOCK)
        # k and v share offsets: one address computation less than with `_load_rows`.
        offset = offs_n[:, None] * 3 * C + tl.arange(0, D)[None, :]
        if IS_EVEN:
            k = tl.load(k_ptr + offset)
            v = tl.load(k_ptr + C + offset)
        else:
            k = tl.load(k_ptr + offset, mask=(offs_n < length)[:, None], other=0.0)
            v = tl.load(k_ptr + C + offset, mask=(offs_n < length)[:, None], other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * qk_scale - lse_i[:, None])  # (queries, keys)
        if IS_DIAGONAL:
            p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
        dp = tl.dot(do, tl.trans(v))
        if DROPOUT:
            rate = load_rate(seeds)
            keep = is_kept(row_hash[:, None], hash_columns(offs_n, seeds)[None, :], rate)
            dp = tl.where(keep, dp * rate[1], 0.0)
        ds = p * (dp - delta_i[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit
def attn_bwd_dkdv(
    qkv,  # (B, T, 3, H, D)
    grad_output,  # (B, T, H, D)
    lse, delta,  # (B, H, T) fp32; delta from attn_bwd_dq
    grad_qkv,  # (B, T, 3, H, D), its keys and values are written
    partials,  # (B * blocks, 3, H, D) fp32, sums of grad_qkv over a tile's tokens
    seeds,  # (4,) int32, see `DropoutSeed`
    length, scale, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, IS_EVEN: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK keys and values of one head."""
    C: tl.constexpr = H * D
    block_n = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    offs_d = tl.arange(0, D)
    offs_n = block_n * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_n < length)[:, None]
    start = batch.to(tl.int64) * length
    head_offset = start * 3 * C + head * D
    k_offset = head_offset + C + offs_n[:, None] * 3 * C + offs_d[None, :]
    k = tl.load(qkv + k_offset, mask=mask, other=0.0)
    v = tl.load(qkv + C + k_offset, mask=mask, other=0.0)
    dk = tl.zeros((BLOCK, D), tl.float32)
    dv = tl.zeros((BLOCK, D), tl.float32)
    q_ptr = qkv + head_offset
    do_ptr = grad_output + start * C + head * D
    row = (batch * H + head) * length
    qk_scale = scale * LOG2_E
    column_hash = hash_columns(offs_n, seeds) if DROPOUT else offs_n
    # Queries before this tile do not attend to it.
    dk, dv = _attn_bwd_dkdv_inner(
        dk, dv, k, v, q_ptr, do_ptr, lse, delta, column_hash, seeds, row, offs_n, block_n * BLOCK,
        block_n * BLOCK + BLOCK, length, qk_scale, C, D, BLOCK, True, IS_EVEN, DROPOUT,
    )  # fmt: skip
    dk, dv = _attn_bwd_dkdv_inner(
        dk, dv, k, v, q_ptr, do_ptr, lse, delta, column_hash, seeds, row, offs_n,
        block_n * BLOCK + BLOCK, length, length, qk_scale, C, D, BLOCK, False, IS_EVEN, DROPOUT,
    )  # fmt: skip
    if DROPOUT:
        dv *= load_rate(seeds)[1]
    rounded_dk = (dk * scale).to(grad_qkv.dtype.element_ty)
    rounded_dv = dv.to(grad_qkv.dtype.element_ty)
    tl.store(grad_qkv + k_offset, rounded_dk, mask=mask)
    tl.store(grad_qkv + C + k_offset, rounded_dv, mask=mask)
    partial_row = (batch * tl.num_programs(0) + block_n).to(tl.int64)
    partial = partials + partial_row * 3 * C + C + head * D + offs_d
    tl.store(partial, tl.sum(tl.where(mask, rounded_dk.to(tl.float32), 0.0), 0))
    tl.store(partial + C, tl.sum(tl.where(mask, rounded_dv.to(tl.float32), 0.0), 0))


@triton.jit
def _attn_bwd_dkdv_inner(
    dk, dv, k, v, q_ptr, do_ptr, lse, delta, column_hash, seeds, row, offs_n, start, stop, length,
    qk_scale, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    IS_DIAGONAL: tl.constexpr, IS_EVEN: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    for start_m in range(start, stop, BLOCK):
        offs_m = start_m + tl.arange(0, BLOCK)
        q = _load_rows(q_ptr, offs_m, 3 * C, length, D, IS_EVEN)
        do = _load_rows(do_ptr, offs_m, C, length, D, IS_EVEN)
        if IS_EVEN:
            lse_i = tl.load(lse + row + offs_m)
            delta_i = tl.load(delta + row + offs_m)
        else:
            lse_i = tl.load(lse + row + offs_m, mask=offs_m < length, other=0.0)
            delta_i = tl.load(delta + row + offs_m, mask=offs_m < length, other=0.0)
        # Transposed, (keys, queries), so that both gradients are plain dots.
        p = tl.exp2(tl.dot(k, tl.trans(q)) * qk_scale - (lse_i * LOG2_E)[None, :])
        if IS_DIAGONAL:
            p = tl.where(offs_n[:, None] <= offs_m[None, :], p, 0.0)
        if not IS_EVEN:
            # Their LSE was loaded as 0, so p would be exp(0) = 1.
            p = tl.where((offs_m < length)[None, :], p, 0.0)
        dp = tl.dot(v, tl.trans(do))
        p_dropped = p
        if DROPOUT:
            rate = load_rate(seeds)
            keep = is_kept(hash_rows(row + offs_m, seeds)[None, :], column_hash[:, None], rate)
            dp = tl.where(keep, dp * rate[1], 0.0)
            p_dropped = tl.where(keep, p, 0.0)
        dv = tl.dot(p_dropped.to(do.dtype), do, dv)
        ds = p * (dp - delta_i[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _load_rows(ptr, rows, stride, length, D: tl.constexpr, IS_EVEN: tl.constexpr):
    """(len(rows), D), zero past the end of the sequence."""
    ptrs = ptr + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if IS_EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(rows < length)[:, None], other=0.0)
