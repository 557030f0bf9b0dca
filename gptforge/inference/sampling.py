"""Picking the next token from logits: pure functions of tensors.

The dice are numbers thrown beforehand, so that a seed gives the same draws on every device, in any
batch, streamed or not, and so that a CUDA graph can hold the whole step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptforge.config import SEED_LIMIT
from gptforge.errors import UserError
from gptforge.inference.validation import is_int, is_number


@dataclass(frozen=True)
class SamplingParams:
    """How to choose among the likely tokens."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest."""
    top_k: int = 200
    """Draw among the k likeliest; 0 among all."""
    top_p: float = 1.0
    """Draw among the fewest that hold this much probability (Holtzman et al., 2020)."""

    def validate(self) -> None:
        """Raise a UserError that names the setting that is out of range."""
        if not is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be a number, 0 or more, not {self.temperature}")
        if not is_int(self.top_k) or self.top_k < 0:
            raise UserError(
                f"--top_k must be a whole number, 0 or more (0: draw among all), not {self.top_k}"
            )
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(
                f"--top_p must be a number above 0 and at most 1 (1: all), not {self.top_p}"
            )


def draw_uniforms(seeds: Sequence[int | None], count: int) -> Tensor:
    """Numbers in [0, 1), one row a seed: (len(seeds), count) float32; None throws fresh ones.

    A row depends on its seed alone, and more throws only make it longer.
    """
    for seed in seeds:
        if seed is not None and not (is_int(seed) and 0 <= seed < SEED_LIMIT):
            raise UserError(
                f"--seed must be a whole number, 0 or more and below 2**63, not {seed!r}"
            )
    rows = [np.random.default_rng(seed).random(count, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """One id for each row of logits.

    Args:
        logits: (B, V) float32, ids without a token already cut off.
        dice: (B,) numbers in [0, 1).
        sampling: its top-k is applied first, top-p to what that leaves.

    Returns:
        (B,) ids.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    if 0 < params.top_k < logits.size(-1):
        logits, ids = logits.topk(params.top_k)
    elif params.top_p < 1:
        logits, ids = logits.sort(-1, descending=True)
    else:
        ids = None
    # From the top down: however small the temperature, the largest stays a number.
    logits = logits - logits.amax(-1, keepdim=True)
    shares = (logits / params.temperature).softmax(-1)
    up_to = shares.cumsum(-1)  # (B, K)
    last = torch.full_like(uniforms, up_to.size(-1) - 1, dtype=torch.long)
    if params.top_p < 1:
        # The first one always stays: nothing lies before it.
        last = ((up_to - shares) < params.top_p).sum(-1).clamp(min=1) - 1
    whole = up_to.gather(-1, last[:, None]).squeeze(-1)
    # Where the sum of all shares below passes the dice; rounding may not pass the last one.
    place = (up_to <= (uniforms * whole)[:, None]).sum(-1).minimum(last)
    return place if ids is None else ids.gather(-1, place[:, None]).squeeze(-1)
