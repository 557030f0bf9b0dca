"""Sampling the next token from logits.

All random numbers are drawn on the CPU in advance, so that a seed gives the same draws on every
device and in every batch, and a CUDA graph can capture the full decode step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptforge.config import SEED_LIMIT
from gptforge.errors import UserError
from gptforge.inference.validation import is_int, is_number
from gptforge.kernels.sampling import MIN_TEMPERATURE
from gptforge.printable import short_repr


@dataclass(frozen=True)
class SamplingParams:
    """Temperature, top-k and top-p."""

    temperature: float = 0.8  # divides the logits; 0 is greedy
    top_k: int = 200  # sample from the k most likely tokens; 0 from all
    # Sample from the smallest set with at least this probability (Holtzman et al., 2020).
    top_p: float = 1.0

    def validate(self, prefix: str = "") -> None:
        """Raise a UserError that names the parameter that is out of range, after `prefix`."""
        t, k, p = self.temperature, self.top_k, self.top_p
        if not is_number(t) or t < 0:
            raise UserError(f"{prefix}temperature must be a number, 0 or more, not {short_repr(t)}")
        if not is_int(k) or k < 0:
            raise UserError(
                f"{prefix}top_k must be a whole number, 0 or more (0: all tokens), not "
                f"{short_repr(k)}"
            )
        if not is_number(p) or not 0 < p <= 1:
            raise UserError(
                f"{prefix}top_p must be a number above 0 and at most 1 (1: all tokens), not "
                f"{short_repr(p)}"
            )


def draw_uniforms(seeds: Sequence[int | None], count: int) -> Tensor:
    """Random numbers in [0, 1), (len(seeds), count) float32; a seed of None is random.

    A row depends only on its seed; with a larger count it has the same numbers first.
    """
    for seed in seeds:
        if seed is not None and not (is_int(seed) and 0 <= seed < SEED_LIMIT):
            raise UserError(
                f"seed must be a whole number, 0 or more and below 2**63, not {short_repr(seed)}"
            )
    rows = [np.random.default_rng(seed).random(count, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def sample(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """Sample one token id per row, (B,), by inverting the cumulative distribution.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1).
        params: top-k is applied first, then top-p.
    """
    if params.temperature == 0:
        return logits.argmax(-1)
    if 0 < params.top_k < logits.size(-1):
        logits, ids = logits.topk(params.top_k)
    elif params.top_p < 1:
        logits, ids = logits.sort(-1, descending=True)
    else:
        ids = None
    # Subtract the maximum before the division: a tiny temperature would make it infinite.
    logits = logits - logits.amax(-1, keepdim=True)
    # A float: torch refuses integers from 2**63 on.
    probs = (logits / max(float(params.temperature), MIN_TEMPERATURE)).softmax(-1)
    # Inversion instead of torch.multinomial: that draws its own numbers, and syncs on CUDA.
    cdf = probs.cumsum(-1)  # (B, K)
    last = torch.full_like(uniforms, cdf.size(-1) - 1, dtype=torch.long)
    if params.top_p < 1:
        # Keep tokens with less than top_p of probability before them, and always the first.
        last = ((cdf - probs) < params.top_p).sum(-1).clamp(min=1) - 1
    total = cdf.gather(-1, last[:, None]).squeeze(-1)
    # `minimum`: rounding must not lead past the last token.
    index = (cdf <= (uniforms * total)[:, None]).sum(-1).minimum(last)
    return index if ids is None else ids.gather(-1, index[:, None]).squeeze(-1)
