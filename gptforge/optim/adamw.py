"""AdamW (Loshchilov and Hutter, 2019), decaying matrices and embeddings but no biases or norms."""

from collections.abc import Iterable

import torch
from torch import nn


def build_adamw(
    model: nn.Module, *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """torch's AdamW, fused into one kernel a step where the device has one.

    The learning rate is set before each step; eps is 1e-8.
    """
    return adamw_over(model.parameters(), betas=betas, weight_decay=weight_decay)


def adamw_over(
    parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """The same over some parameters."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in parameters)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=fused)
