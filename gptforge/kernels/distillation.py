"""Distillation loss (Hinton et al., 2015) whose gradient overwrites the logits.

The student's targets are a mixture: `1 - weight` of the next token, and `weight` of the mean of the
teachers' probabilities, at temperature 1. Unlike `kernels.cross_entropy`, a program holds full rows
in registers, so this is for small vocabularies.

Shapes: N tokens, K teachers, V vocabulary.
"""

import torch
from torch import Tensor

from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.kernels.launch import tile_shape, uses_triton

MAX_VOCAB = 8192
"""Largest vocabulary: K + 1 rows of it have to fit into the registers of a program."""


def distillation_in_place(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    weight: float,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Overwrite the logits with the gradient of the distillation loss.

    Args:
        logits: (N, V) of the student; they become `scale` times the gradient of
            (1 - weight) * cross_entropy(targets) + weight * cross_entropy(teacher probabilities),
            summed over the tokens.
        teacher_logits: (K, N, V).
        targets: (N,) ids. Where one is IGNORE_INDEX, loss and gradient are zero.
        weight: of the teachers, from 0 to 1.
        scale: of the gradient.

    Returns:
        The cross-entropy with `targets` alone (N,) in nats, which is comparable between runs with
        and without teachers.
    """
    if not uses_triton(logits):
        return _distillation_torch(logits, teacher_logits, targets, weight, scale)
    from gptforge.kernels.triton import distillation as kernels

    rows, columns = logits.shape
    assert columns <= MAX_VOCAB
    assert logits.is_contiguous() and teacher_logits.is_contiguous()
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=logits.device)
    block, rows_per_program = tile_shape(columns)
    kernels.distillation[(-(-rows // rows_per_program),)](
        logits, teacher_logits, targets.contiguous(), losses, IGNORE_INDEX, weight, scale, rows,
        columns=columns, TEACHERS=len(teacher_logits), BLOCK=block, ROWS=rows_per_program,
        num_warps=8,
    )  # fmt: skip
    return losses


def _distillation_torch(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weight: float,
    scale: float | Tensor,
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    is_valid = (targets != IGNORE_INDEX)[:, None]  # (N, 1)
    index = torch.where(is_valid, targets[:, None], 0)
    x = logits.to(dtype, copy=True)
    x -= x.logsumexp(1, keepdim=True)  # log-softmax, (N, V)
    losses = torch.where(is_valid, -x.gather(1, index), 0)[:, 0]
    # d loss / d logits = softmax - target probabilities
    x.exp_()
    x.scatter_add_(1, index, x.new_full(index.shape, weight - 1))
    x -= weight * teacher_logits.to(dtype).softmax(-1).mean(0)
    logits.copy_(x.mul_(is_valid * scale))
    return losses
