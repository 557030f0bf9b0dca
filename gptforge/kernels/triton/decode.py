"""Kernels of a decode step; see `gptforge.kernels.decode`.

A step reads every weight once for a few activations, so it is fast if there are few kernels, and
if each uses the full memory bandwidth from its start. A program first loads a few rows of a weight.
While they arrive, it computes what every program needs: the LayerNorm of the residual, or the
combination of the attention splits. Computing it again in each is cheaper than another kernel.
Activations between kernels are float32.

With PDL (programmatic dependent launch, Hopper) a kernel may start while the one before is running:
it loads weights, which never change, and then waits in `_wait`.

Shapes: B sequences (program_id(0) is one of them), C `columns`, H `heads` of D channels.
"""

import triton
import triton.language as tl


@triton.jit
def embedding(
    ids, starts, slot,  # (B,), (B,), () int64: token, first slot of its sequence, this slot
    wte, wpe,  # (V, C) and (positions, C)
    x,  # (B, C) fp32
    columns: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x = wte[id] + wpe[slot - start]."""
    pid_b = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    in_row = column < columns
    _wait(PDL)
    token = tl.load(ids + pid_b)
    position = tl.load(slot) - tl.load(starts + pid_b)
    token_emb = tl.load(wte + token * columns + column, mask=in_row, other=0.0).to(tl.float32)
    pos_emb = tl.load(wpe + position * columns + column, mask=in_row, other=0.0).to(tl.float32)
    tl.store(x + pid_b * columns + column, token_emb + pos_emb, mask=in_row)


@triton.jit
def layer_norm_qkv(
    x,  # (B, C) fp32
    norm_weight, norm_bias,  # (C,)
    weight, bias,  # (3 * C, C) and (3 * C,)
    q,  # (B, C) fp32
    kv_cache, slot,  # (2, B, H, S, D) and () int64
    eps, stride_kv, stride_b, stride_h,  # strides of kv_cache
    columns: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """q, k, v = linear(layer_norm(x)); k and v go into their slot of the cache."""
    pid_b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _load_weight(weight, row, 3 * columns, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < 3 * columns, other=0.0)
    norm_w = _load_channels(norm_weight, columns, BLOCK)
    norm_b = _load_channels(norm_bias, columns, BLOCK)
    _wait(PDL)
    slot_index = tl.load(slot)
    value = _load_channels(x + pid_b * columns, columns, BLOCK)
    value = _layer_norm(value, norm_w, norm_b, eps, columns, BLOCK)
    y = tl.sum(w.to(tl.float32) * value[None, :], 1) + b.to(tl.float32)
    third = row // columns  # q, k or v
    channel = row % columns
    tl.store(q + pid_b * columns + channel, y, mask=third == 0)
    k_ptr = kv_cache + pid_b * stride_b + (channel // D) * stride_h
    k_ptr += slot_index * D + channel % D
    rounded = y.to(kv_cache.dtype.element_ty)
    tl.store(k_ptr, rounded, mask=third == 1)
    tl.store(k_ptr + stride_kv, rounded, mask=third == 2)


@triton.jit
def split_kv_attention(
    q,  # (B, C) fp32
    kv_cache,  # (2, B, H, S, D)
    starts, slot,  # (B,) and () int64
    out,  # (B, SPLITS, H, D) fp32
    lse,  # (B, SPLITS, H) fp32, log-sum-exp; minus infinity for an empty split
    scale, stride_kv, stride_b, stride_h, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one head over one split of its sequence's filled slots (flash decoding)."""
    pid_b = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    _wait(PDL)
    start = tl.load(starts + pid_b).to(tl.int32)
    end = tl.load(slot).to(tl.int32) + 1
    slots_per_split = tl.cdiv(end - start, SPLITS)
    first = start + split * slots_per_split
    last = tl.minimum(first + slots_per_split, end)
    offs_d = tl.arange(0, BLOCK)
    in_head = offs_d < D
    query = tl.load(q + (pid_b * heads + head) * D + offs_d, mask=in_head, other=0.0) * scale
    k_ptr = kv_cache + pid_b * stride_b + head * stride_h
    # Finite, since -inf - -inf is NaN in an empty split, whose LSE becomes -inf by log(0).
    m_i = tl.full((), -1e30, tl.float32)
    l_i = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    m_i, l_i, acc = _attend_slots(
        m_i, l_i, acc, query, k_ptr, stride_kv, first, last, D, BLOCK, TILE
    )
    partial = (pid_b * SPLITS + split) * heads + head
    tl.store(out + partial * D + offs_d, acc / tl.maximum(l_i, 1e-30), mask=in_head)
    tl.store(lse + partial, m_i + tl.log(l_i))


@triton.jit
def decode_attention(
    qkv,  # (B, 3, H, D)
    kv_cache,  # (2, B, H, S, D)
    starts, slot,  # (B,) and () int64
    out,  # (B, H, D)
    scale, stride_kv, stride_b, stride_h, heads,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention of one head of a new token, whose key and value are written to the cache."""
    pid_b = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + pid_b).to(tl.int32)
    end = tl.load(slot).to(tl.int32)
    offs_d = tl.arange(0, BLOCK)
    in_head = offs_d < D
    columns = heads * D
    q_ptr = qkv + pid_b * 3 * columns + head * D + offs_d
    query = tl.load(q_ptr, mask=in_head, other=0.0).to(tl.float32) * scale
    k_new = tl.load(q_ptr + columns, mask=in_head, other=0.0)
    v_new = tl.load(q_ptr + 2 * columns, mask=in_head, other=0.0)
    k_ptr = kv_cache + pid_b.to(tl.int64) * stride_b + head * stride_h
    new_slot = k_ptr + end * D + offs_d
    tl.store(new_slot, k_new.to(kv_cache.dtype.element_ty), mask=in_head)
    tl.store(new_slot + stride_kv, v_new.to(kv_cache.dtype.element_ty), mask=in_head)
    # The new token attends to itself first, from registers: no wait for the stores above.
    m_i = tl.sum(k_new.to(tl.float32) * query, 0)
    l_i = tl.full((), 1.0, tl.float32)
    acc = v_new.to(tl.float32)
    m_i, l_i, acc = _attend_slots(
        m_i, l_i, acc, query, k_ptr, stride_kv, start, end, D, BLOCK, TILE
    )
    y = (acc / l_i).to(out.dtype.element_ty)
    tl.store(out + pid_b * columns + head * D + offs_d, y, mask=in_head)


@triton.jit
def _attend_slots(
    m_i, l_i, acc, query, k_ptr, stride_kv, start, end,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Online softmax over slots `start` to `end`: running maximum, sum and weighted values."""
    offs_d = tl.arange(0, BLOCK)
    while start < end:
        slots = start + tl.arange(0, TILE)
        in_range = slots < end
        mask = in_range[:, None] & (offs_d < D)[None, :]
        ptr = k_ptr + slots[:, None] * D + offs_d[None, :]
        k = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(ptr + stride_kv, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(in_range, tl.sum(k * query[None, :], 1), -float("inf"))
        m_new = tl.maximum(m_i, tl.max(score, 0))
        alpha = tl.exp(m_i - m_new)
        p = tl.exp(score - m_new)
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = acc * alpha + tl.sum(p[:, None] * v, 0)
        m_i = m_new
        start += TILE
    return m_i, l_i, acc


@triton.jit
def combine_proj_add(
    partial_out, partial_lse,  # (B, SPLITS, H, D) and (B, SPLITS, H) fp32
    weight, bias,  # (C, C) and (C,)
    x,  # (B, C) fp32, added to
    heads, columns: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += linear(attention), with attention combined from its splits by their log-sum-exp."""
    pid_b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _load_weight(weight, row, columns, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < columns, other=0.0)
    _wait(PDL)
    x_ptr = x + pid_b * columns + row
    residual = tl.load(x_ptr, mask=row < columns, other=0.0)
    column = tl.arange(0, BLOCK)
    in_row = column < columns
    m_i = tl.full((BLOCK,), -1e30, tl.float32)
    l_i = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    # Weights of the splits are the softmax over their log-sum-exps (flash decoding).
    for split in tl.static_range(SPLITS):
        partial = (pid_b * SPLITS + split) * heads
        lse = tl.load(partial_lse + partial + column // D, mask=in_row, other=0.0)
        out = tl.load(partial_out + partial * D + column, mask=in_row, other=0.0)
        m_new = tl.maximum(m_i, lse)
        alpha = tl.exp(m_i - m_new)
        p = tl.exp(lse - m_new)
        l_i = l_i * alpha + p
        acc = acc * alpha + out * p
        m_i = m_new
    y = tl.sum(w.to(tl.float32) * (acc / l_i)[None, :], 1)
    tl.store(x_ptr, residual + y + b.to(tl.float32), mask=row < columns)


@triton.jit
def layer_norm_linear(
    x,  # (B, C) fp32
    norm_weight, norm_bias,  # (C,)
    weight, bias,  # (outputs, C) and (outputs,)
    out,  # (B, outputs) fp32
    outputs, eps, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = linear(layer_norm(x)), then GELU if GELU."""
    pid_b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _load_weight(weight, row, outputs, columns, 0, BLOCK)
    norm_w = _load_channels(norm_weight, columns, BLOCK)
    norm_b = _load_channels(norm_bias, columns, BLOCK)
    if HAS_BIAS:
        b = tl.load(bias + row, mask=row < outputs, other=0.0)
    _wait(PDL)
    value = _load_channels(x + pid_b * columns, columns, BLOCK)
    value = _layer_norm(value, norm_w, norm_b, eps, columns, BLOCK)
    y = tl.sum(w.to(tl.float32) * value[None, :], 1)
    if HAS_BIAS:
        y += b.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        # (1 + tanh(a)) / 2 = sigmoid(2 * a)
        y = y / (1.0 + tl.exp(-2.0 * inner))
    tl.store(out + pid_b * outputs + row, y, mask=row < outputs)


@triton.jit
def linear_add(
    y,  # (B, columns) fp32
    weight, bias,  # (outputs, columns) and (outputs,)
    x,  # (B, outputs) fp32, added to
    outputs, columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x += linear(y)."""
    pid_b = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _load_weight(weight, row, outputs, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < outputs, other=0.0)
    _wait(PDL)
    x_ptr = x + pid_b * outputs + row
    residual = tl.load(x_ptr, mask=row < outputs, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, columns, BLOCK):
        if start:
            w = _load_weight(weight, row, outputs, columns, start, BLOCK)
        column = start + tl.arange(0, BLOCK)
        value = tl.load(y + pid_b * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(w.to(tl.float32) * value[None, :], 1)
    tl.store(x_ptr, residual + total + b.to(tl.float32), mask=row < outputs)


@triton.jit
def _load_weight(
    weight, row, rows, columns: tl.constexpr, start: tl.constexpr, BLOCK: tl.constexpr
):
    """(ROWS, BLOCK) of a weight, from column `start` on."""
    column = start + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * columns + column[None, :]
    # Callers convert to fp32, after `_wait`: the conversion would wait for the load here.
    return tl.load(weight + offset, mask=mask, other=0.0)


@triton.jit
def _load_channels(ptr, columns: tl.constexpr, BLOCK: tl.constexpr):
    """A row, padded with zeros."""
    column = tl.arange(0, BLOCK)
    return tl.load(ptr + column, mask=column < columns, other=0.0)


@triton.jit
def _layer_norm(value, weight, bias, eps, columns: tl.constexpr, BLOCK: tl.constexpr):
    """LayerNorm of a row, padded with zeros."""
    in_row = tl.arange(0, BLOCK) < columns
    centered = tl.where(in_row, value - tl.sum(value, 0) / columns, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, 0) / columns + eps)
    return centered * rstd * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _wait(PDL: tl.constexpr):
    """Let the next kernel start, and wait until the one before has finished and flushed its writes.

    Every kernel waits before it reads or writes activations. A kernel finishes only after its wait,
    so all kernels are ordered, not just neighbors.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
