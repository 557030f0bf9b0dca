"""The kernels of a step of writing, in Triton. Imported only where one is about to run.

`decode.py` says what each computes, and has the plain torch for it. A step reads every weight once
for a handful of numbers, so what counts is that all of memory's lanes are busy from a kernel's
first moment, and that there are few kernels. A program therefore takes a few rows of a weight, asks
for them before anything else, and meanwhile makes by itself what all programs need: the LayerNorm
of the stream, or the sum of attention's parts. Between kernels everything is float32.

With EARLY, a kernel may come in while the one before is at work, as far as `_wait`: so far it has
asked for what never changes. CUDA calls this programmatic dependent launch; Hopper was the first to
have it.

Shapes: B sequences (program_id(0) is one of them), C `columns` that come in, H `heads` of D `size`.
"""

import triton
import triton.language as tl


@triton.jit
def embed(
    ids, starts, slot, wte, wpe, x,
    columns: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` (B, C) is the embedding of a token and of its place in its own sequence."""
    sequence = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    _wait(EARLY)
    token = tl.load(ids + sequence)
    place = tl.load(slot) - tl.load(starts + sequence)
    what = tl.load(wte + token * columns + column, mask=inside, other=0.0).to(tl.float32)
    where = tl.load(wpe + place * columns + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + sequence * columns + column, what + where, mask=inside)


@triton.jit
def norm_qkv(
    x, norm_weight, norm_bias, weight, bias, q, memory, slot, eps, apart, far, between,
    columns: tl.constexpr, size: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """`q` (B, C) from the normalised stream; k and v go to `memory`, into their slot.

    There, values lie `apart` behind the keys, sequences `far` and heads `between` from each other.
    """
    sequence = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _rows_of(weight, row, 3 * columns, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < 3 * columns, other=0.0)
    norm_w = _channels(norm_weight, columns, BLOCK)
    norm_b = _channels(norm_bias, columns, BLOCK)
    _wait(EARLY)
    place = tl.load(slot)
    value = _channels(x + sequence * columns, columns, BLOCK)
    value = _normed(value, norm_w, norm_b, eps, columns, BLOCK)
    y = tl.sum(w.to(tl.float32) * value[None, :], 1) + b.to(tl.float32)
    third = row // columns
    channel = row % columns
    tl.store(q + sequence * columns + channel, y, mask=third == 0)
    own = memory + sequence * far + (channel // size) * between
    own += place * size + channel % size
    narrow = y.to(memory.dtype.element_ty)
    tl.store(own, narrow, mask=third == 1)
    tl.store(own + apart, narrow, mask=third == 2)


@triton.jit
def attend(
    q, memory, starts, slot, mixes, logs, scale, apart, far, between, heads,
    size: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head's look at its share of the slots that its sequence has filled.

    `mixes` (B, SPLITS, H, D) are means of values, weighted by the exponentials of the scores, and
    `logs` (B, SPLITS, H) the logarithms of these weights' sums: minus infinity without a slot.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    _wait(EARLY)
    start = tl.load(starts + sequence).to(tl.int32)
    end = tl.load(slot).to(tl.int32) + 1
    each = tl.cdiv(end - start, SPLITS)
    first = start + split * each
    last = tl.minimum(first + each, end)
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    asked = tl.load(q + (sequence * heads + head) * size + lane, mask=inside, other=0.0) * scale
    keys = memory + sequence * far + head * between
    top = -1e30
    total = 0.0
    mix = tl.zeros((BLOCK,), tl.float32)
    begin = first
    while begin < last:
        place = begin + tl.arange(0, TILE)
        seen = place < last
        mask = seen[:, None] & inside[None, :]
        at = keys + place[:, None] * size + lane[None, :]
        k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(at + apart, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * asked[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink = tl.exp(top - higher)
        share = tl.exp(score - higher)
        total = total * shrink + tl.sum(share, 0)
        mix = mix * shrink + tl.sum(share[:, None] * v, 0)
        top = higher
        begin += TILE
    part = (sequence * SPLITS + split) * heads + head
    tl.store(mixes + part * size + lane, mix / tl.maximum(total, 1e-30), mask=inside)
    tl.store(logs + part, top + tl.log(total))


@triton.jit
def attend_next(
    qkv, memory, starts, slot, out, scale, apart, far, between, heads,
    size: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head's whole look, for many sequences: `out` (B, C) from `qkv` (B, 3 * C).

    The new token's key and value go into their slot, but are looked at here, first of all.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(starts + sequence).to(tl.int32)
    end = tl.load(slot).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    inside = lane < size
    columns = heads * size
    own = qkv + sequence * 3 * columns + head * size + lane
    asked = tl.load(own, mask=inside, other=0.0).to(tl.float32) * scale
    own_key = tl.load(own + columns, mask=inside, other=0.0)
    own_value = tl.load(own + 2 * columns, mask=inside, other=0.0)
    keys = memory + sequence.to(tl.int64) * far + head * between
    here = keys + end * size + lane
    tl.store(here, own_key.to(memory.dtype.element_ty), mask=inside)
    tl.store(here + apart, own_value.to(memory.dtype.element_ty), mask=inside)
    top = tl.sum(own_key.to(tl.float32) * asked, 0)
    total = 1.0
    mix = own_value.to(tl.float32)
    begin = start
    while begin < end:
        place = begin + tl.arange(0, TILE)
        seen = place < end
        mask = seen[:, None] & inside[None, :]
        at = keys + place[:, None] * size + lane[None, :]
        k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(at + apart, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * asked[None, :], 1), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink = tl.exp(top - higher)
        share = tl.exp(score - higher)
        total = total * shrink + tl.sum(share, 0)
        mix = mix * shrink + tl.sum(share[:, None] * v, 0)
        top = higher
        begin += TILE
    result = (mix / total).to(out.dtype.element_ty)
    tl.store(out + sequence * columns + head * size + lane, result, mask=inside)


@triton.jit
def attended_onto(
    mixes, logs, weight, bias, x, heads,
    columns: tl.constexpr, size: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` (B, C) grows by attention's output, whose parts `attend` left, through the layer."""
    sequence = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _rows_of(weight, row, columns, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < columns, other=0.0)
    _wait(EARLY)
    own_x = x + sequence * columns + row
    before = tl.load(own_x, mask=row < columns, other=0.0)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mix = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        part = (sequence * SPLITS + split) * heads
        own = tl.load(logs + part + column // size, mask=inside, other=0.0)
        own_mix = tl.load(mixes + part * size + column, mask=inside, other=0.0)
        higher = tl.maximum(top, own)
        shrink = tl.exp(top - higher)
        own_weight = tl.exp(own - higher)
        total = total * shrink + own_weight
        mix = mix * shrink + own_mix * own_weight
        top = higher
    y = tl.sum(w.to(tl.float32) * (mix / total)[None, :], 1)
    tl.store(own_x, before + y + b.to(tl.float32), mask=row < columns)


@triton.jit
def norm_product(
    x, norm_weight, norm_bias, weight, bias, out, outputs, eps,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`out` (B, outputs) is the normalised stream through the layer, and through GELU if asked."""
    sequence = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _rows_of(weight, row, outputs, columns, 0, BLOCK)
    norm_w = _channels(norm_weight, columns, BLOCK)
    norm_b = _channels(norm_bias, columns, BLOCK)
    if HAS_BIAS:
        b = tl.load(bias + row, mask=row < outputs, other=0.0)
    _wait(EARLY)
    value = _channels(x + sequence * columns, columns, BLOCK)
    value = _normed(value, norm_w, norm_b, eps, columns, BLOCK)
    y = tl.sum(w.to(tl.float32) * value[None, :], 1)
    if HAS_BIAS:
        y += b.to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        # (1 + tanh(a)) / 2 is the logistic function of 2 a.
        y = y / (1.0 + tl.exp(-2.0 * inner))
    tl.store(out + sequence * outputs + row, y, mask=row < outputs)


@triton.jit
def product_onto(
    y, weight, bias, x, outputs,
    columns: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """`x` (B, outputs) grows by y (B, C) through the layer."""
    sequence = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w = _rows_of(weight, row, outputs, columns, 0, BLOCK)
    b = tl.load(bias + row, mask=row < outputs, other=0.0)
    _wait(EARLY)
    own_x = x + sequence * outputs + row
    before = tl.load(own_x, mask=row < outputs, other=0.0)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in tl.static_range(0, columns, BLOCK):
        if begin:
            w = _rows_of(weight, row, outputs, columns, begin, BLOCK)
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(y + sequence * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(w.to(tl.float32) * value[None, :], 1)
    tl.store(own_x, before + total + b.to(tl.float32), mask=row < outputs)


@triton.jit
def _rows_of(weight, row, rows, columns: tl.constexpr, begin: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of a weight, (ROWS, BLOCK), from column `begin` on."""
    column = begin + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    # Widened by the caller behind `_wait`: doing so waits for the memory.
    return tl.load(weight + place, mask=mask, other=0.0)


@triton.jit
def _channels(at, columns: tl.constexpr, BLOCK: tl.constexpr):
    """All channels of a row, 0 behind its end."""
    column = tl.arange(0, BLOCK)
    return tl.load(at + column, mask=column < columns, other=0.0)


@triton.jit
def _normed(value, weight, bias, eps, columns: tl.constexpr, BLOCK: tl.constexpr):
    """The LayerNorm of a row, 0 behind its end."""
    inside = tl.arange(0, BLOCK) < columns
    apart = tl.where(inside, value - tl.sum(value, 0) / columns, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / columns + eps)
    return apart * inverse * weight.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Let the next kernel come in; go on when the one before has left, and its writes are seen.

    Every kernel waits before it reads or writes what another one touches. Since each leaves only
    after those before it, that holds for all of them, not only for neighbours.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
