"""Distillation loss; see `gptforge.kernels.distillation`. A program holds full rows."""

import triton
import triton.language as tl

from gptforge.kernels.triton.gelu import LOG2_E


@triton.jit(do_not_specialize=["ignore_index", "weight", "rows"])
def distillation(
    logits,  # (rows, columns), overwritten by their gradient
    teacher_logits,  # (TEACHERS, rows, columns)
    targets,  # (rows,) int64
    losses,  # (rows,) fp32, cross-entropy with the targets alone
    ignore_index,
    weight,  # of the teachers in the target probabilities
    scale,  # () fp32, factor of the gradient
    rows, columns: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """logits = scale * (softmax - (1 - weight) * one_hot - weight * mean of teachers' softmax)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    # Rows beyond the last one are all zeros: with -inf their softmax would be NaN.
    padding = tl.where(column < columns, 0.0, -float("inf"))[None, :]
    target = tl.load(targets + row, mask=row < rows, other=ignore_index)
    is_valid = target != ignore_index
    is_target = column[None, :] == tl.where(is_valid, target, 0)[:, None]

    x = tl.load(logits + offset, mask=mask, other=0.0).to(tl.float32) + padding
    m = tl.max(x, 1)
    exp = tl.exp2((x - m[:, None]) * LOG2_E)
    sum_exp = tl.sum(exp, 1)
    target_logit = tl.sum(tl.where(is_target, x, 0.0), 1)
    loss = tl.log(sum_exp) + (m - target_logit)
    tl.store(losses + row, tl.where(is_valid, loss, 0.0), mask=row < rows)

    grad = exp / sum_exp[:, None] - tl.where(is_target, 1 - weight, 0.0)
    for _ in tl.static_range(TEACHERS):
        y = tl.load(teacher_logits + offset, mask=mask, other=0.0).to(tl.float32) + padding
        exp = tl.exp2((y - tl.max(y, 1)[:, None]) * LOG2_E)
        grad -= exp * (weight / TEACHERS / tl.sum(exp, 1))[:, None]
        teacher_logits += rows.to(tl.int64) * columns
    grad *= tl.where(is_valid, tl.load(scale), 0.0)[:, None]
    tl.store(logits + offset, grad.to(logits.dtype.element_ty), mask=mask)
