"""Cross-entropy with the gradient in place; see `gptforge.kernels.cross_entropy`."""

import triton
import triton.language as tl

from gptforge.kernels.triton.gelu import LOG2_E


@triton.jit(do_not_specialize=["ignore_index", "rows", "programs"])
def cross_entropy(
    logits,  # (rows, columns), overwritten by their gradient
    targets,  # (rows,) int64
    losses,  # (rows,) fp32
    stride, ignore_index,
    scale,  # () fp32, factor of the gradient
    rows, programs, columns: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Online softmax over each row, then a second read that writes softmax - one_hot.

    Programs loop over rows; there are few enough of them that the rows stay in the L2 cache between
    the two reads. After llm.c's fused classifier.
    """
    for row in range(tl.program_id(0), rows, programs):
        logits_row = logits + row * stride.to(tl.int64)
        _cross_entropy_row(
            logits_row, targets + row, losses + row, ignore_index, scale, columns, BLOCK
        )


@triton.jit
def _cross_entropy_row(
    logits, target_ptr, loss_ptr, ignore_index, scale, columns: tl.constexpr, BLOCK: tl.constexpr
):
    target = tl.load(target_ptr)
    # Each thread keeps a maximum and a sum for its eight columns of a block: reducing across
    # threads in every block would take 50% longer. -3.4e38 since -inf - -inf is NaN.
    m_i = tl.full((BLOCK // 8,), -3.4e38, tl.float32)
    l_i = tl.zeros((BLOCK // 8,), tl.float32)
    FULL: tl.constexpr = columns // BLOCK * BLOCK
    for start in range(0, FULL, BLOCK):
        m_i, l_i = _online_softmax(logits, start, m_i, l_i, columns, BLOCK, False)
    if columns > FULL:
        m_i, l_i = _online_softmax(logits, FULL, m_i, l_i, columns, BLOCK, True)
    m = tl.max(m_i, 0)
    sum_exp = tl.sum(l_i * tl.exp2((m_i - m) * LOG2_E), 0)
    is_valid = target != ignore_index
    index = tl.where(is_valid, target, 0)
    target_logit = tl.load(logits + index).to(tl.float32)
    tl.store(loss_ptr, tl.where(is_valid, tl.log(sum_exp) + (m - target_logit), 0.0))
    weight = tl.where(is_valid, tl.load(scale), 0.0)
    # The gradient is scale * softmax = exp2((x - m) * log2(e) - log2_norm): no multiplication per
    # column. For ignored targets log2_norm is infinite, and the gradient 0.
    log2_norm = tl.log2(sum_exp) - tl.log2(weight)
    # All threads must have read the target's logit before one of them overwrites it.
    tl.debug_barrier()
    for start in range(0, FULL, BLOCK):
        _write_gradient(logits, start, m, log2_norm, columns, BLOCK, False)
    if columns > FULL:
        _write_gradient(logits, FULL, m, log2_norm, columns, BLOCK, True)
    # And the one-hot term has to be written after the loop has written the target's column.
    tl.debug_barrier()
    target_grad = tl.exp2((target_logit - m) * LOG2_E - log2_norm) - weight
    tl.store(logits + index, target_grad.to(logits.dtype.element_ty))


@triton.jit
def _thread_columns(columns: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK / 8, 8) column offsets, eight per thread: adjacent if one 16-byte load is aligned."""
    thread, i = tl.arange(0, BLOCK // 8)[:, None], tl.arange(0, 8)[None, :]
    if columns % 8 == 0:
        return thread * 8 + i
    else:
        return thread + i * (BLOCK // 8)


@triton.jit
def _online_softmax(
    logits, start, m_i, l_i, columns: tl.constexpr, BLOCK: tl.constexpr, IS_LAST: tl.constexpr
):
    offset = start + _thread_columns(columns, BLOCK)
    if IS_LAST:
        mask = offset < columns
        # evict_last: keep the row in the L2 cache for the second read, which evicts it.
        x = tl.load(logits + offset, mask, -float("inf"), eviction_policy="evict_last")
    else:
        x = tl.load(logits + offset, eviction_policy="evict_last")
    x = x.to(tl.float32)
    m_new = tl.maximum(m_i, tl.max(x, 1))
    sum_exp = tl.sum(tl.exp2((x - m_new[:, None]) * LOG2_E), 1)
    return m_new, l_i * tl.exp2((m_i - m_new) * LOG2_E) + sum_exp


@triton.jit
def _write_gradient(
    logits, start, m, log2_norm,
    columns: tl.constexpr, BLOCK: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    offset = start + _thread_columns(columns, BLOCK)
    mask = offset < columns if IS_LAST else None
    x = tl.load(logits + offset, mask, eviction_policy="evict_first").to(tl.float32)
    grad = tl.exp2((x - m) * LOG2_E - log2_norm).to(logits.dtype.element_ty)
    # .cs (streaming): the next GEMM reads far more logits than fit into the cache.
    tl.store(logits + offset, grad, mask, cache_modifier=".cs")
