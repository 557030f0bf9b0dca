"""Picking the next token from logits: pure functions of tensors."""

import torch
from torch import Tensor


def pick(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id from each row of logits.

    Args:
        logits: (B, V), ids without a token already cut off.
        temperature: divides the logits; 0 takes the most likely id.
        top_k: draw among the k most likely; 0 draws among all.
        top_p: draw among the fewest ids that hold this much probability; 1 draws among all
            (Holtzman et al., 2020).
        generator: where the dice come from.

    Returns:
        (B,) ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # From the top down: however small the temperature, the largest stays a number.
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row, minus infinity elsewhere; 0 keeps all."""
    if k <= 0 or k >= logits.size(-1):
        return logits
    kept = torch.full_like(logits, float("-inf"))
    best = logits.topk(k, dim=-1)
    return kept.scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest largest logits of each row that hold probability p, minus infinity elsewhere."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    # The first one always stays: nothing lies before it.
    ordered = ordered.masked_fill(before >= max(p, 1e-9), float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, ordered)
