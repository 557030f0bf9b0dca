"""Learning from teachers: frozen models of the same shape, trained first with other seeds.

An ensemble predicts better than any of its members. A model that learns from the ensemble's
probabilities and from the text keeps most of this gain at the size of one member (Hinton et al.,
2015; Kim et al., "Pre-training under infinite compute", 2025).

This is the reference, for autograd; the manual backward has `kernels.distillation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.cross_entropy import IGNORE_INDEX
from gptforge.model import GPT


@dataclass(frozen=True)
class Distillation:
    """Teachers, and their weight in the loss."""

    teachers: Sequence[GPT]  # on the student's device, in evaluation mode and without dropout
    weight: float
    """Weight of the teachers' probabilities, from 0 to 1; that of the targets is 1 - weight."""

    @torch.no_grad()
    def probs(self, idx: Tensor) -> Tensor:
        """Mean over the teachers of their float32 probabilities: (B, T) to (B, T, V)."""
        probs = [teacher(idx).float().softmax(-1) for teacher in self.teachers]
        return torch.stack(probs).mean(0)

    def loss(self, logits: Tensor, idx: Tensor, targets: Tensor, target_loss: Tensor) -> Tensor:
        """Compute the summed loss to train with.

        Args:
            logits: (B, T, V) of the student.
            idx: (B, T) token ids.
            targets: (B, T) next token ids; IGNORE_INDEX where there is none.
            target_loss: summed cross-entropy of the logits and `targets`.
        """
        probs = self.probs(idx) * (targets != IGNORE_INDEX)[..., None]
        soft_loss = F.cross_entropy(
            logits.float().flatten(0, 1), probs.flatten(0, 1), reduction="sum"
        )
        return (1 - self.weight) * target_loss + self.weight * soft_loss
