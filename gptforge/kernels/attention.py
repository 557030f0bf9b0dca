"""Causal attention: torch's kernels, and two plain products where those are slow.

On a CPU in bfloat16 torch's own kernel does not reach the CPU's bfloat16 instructions, and its
backward pass takes up to ten times as long as two batched products (docs/log.md has the figures).

Shapes: B sequences, H heads, T tokens, D channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 512
"""Tokens up to which the (T, T) scores are made: beyond, their memory outweighs the gain."""


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Each token's mix of the values up to its own; all (B, H, T, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) <= LONGEST:
        return attend_by_products(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same from batched matrix products, the scores written out."""
    B, H, T, D = q.shape  # noqa: N806
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    future = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    # One product makes the scores, scales them and rules the future out.
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5)
    # Autocast would turn them into float32, and back.
    with torch.autocast(q.device.type, enabled=False):
        shares = F.dropout(scores.softmax(-1), dropout, dropout > 0)
        return (shares @ v).view(B, H, T, D)
