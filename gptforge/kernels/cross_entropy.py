"""The output layer and its loss in one: the gradient takes the place of the logits.

The logits are the largest tensor of a GPT-2: 3.3 GB for 32,768 tokens in bfloat16. A plain
cross-entropy writes them, reads them for the loss, and writes as many gradients, on a CPU three
times over in float32. Here each row is read, and its gradient left where it was; the second look at
a row comes from the cache. On a GPU that is one kernel, on a CPU plain torch, a few rows at a time.
Known from Liger Kernel (Hsu et al., 2024) and llm.c; unlike Liger's, the rows are not cut into
chunks, which costs large matrix products their speed.

Shapes: N tokens, C channels, V rows of the token table.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.launch import num_sms


def fused_linear_cross_entropy_reference(
    hidden: Tensor, table: Tensor, targets: Tensor, ignore: int
) -> Tensor:
    """What `head_loss` computes, in plain torch."""
    logits = F.linear(hidden, table.to(hidden.dtype))
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="sum")


def fused_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> Tensor:
    """Cross-entropy of `hidden @ table.T` against `targets`, in nats, summed over the tokens.

    Args:
        hidden: (N, C) bfloat16, or float32 on a CPU.
        table: (V, C) float32; its gradient is summed in float32 too.
        targets: (N,) ids; those equal to `ignore` count for nothing.
        ignore: the id that is no target.

    Returns:
        A float32 scalar.

    Raises:
        ImportError: on a GPU, if Triton is missing.
    """
    loss: Tensor = _FusedLinearCrossEntropy.apply(hidden, weight, targets, ignore_index)  # type: ignore[no-untyped-call]
    return loss


_PIECE = 2**20
"""Logits that a CPU works on at a time: 4 MB of float32."""


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Autograd's view of it: the forward pass leaves the logits' gradient for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, ignore: int) -> Tensor:
        narrow = table.to(hidden.dtype)
        logits = hidden @ narrow.t()  # (N, V)
        losses = cross_entropy_in_place(logits, targets, ignore)
        ctx.save_for_backward(hidden, narrow, logits)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, narrow, gradient = ctx.saved_tensors
        # A kernel first: a product as the first thing that torch's backward thread does warns.
        scale = upstream[0].clone()
        # In float32 until it is scaled: the scale itself, rounded, would bend every gradient.
        to_hidden = _wide_product(gradient, narrow).mul_(scale)
        to_table = _wide_product(gradient.t(), hidden).mul_(scale)
        return to_hidden.to(hidden.dtype), to_table, None, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A product in float32 of narrow factors."""
    # Only CUDA's product can be told to give a wider type than its factors have.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, ignore_index: int, scale: float | Tensor = 1.0
) -> Tensor:
    """Losses (N,) of logits (N, V), which become `scale` times the gradient of the losses' sum."""
    if not logits.is_cuda:
        return _in_place_on_cpu(logits, targets, ignore_index, scale)
    rows, columns = logits.shape
    assert logits.stride(1) == 1, "a row must lie in one piece"
    from gptforge.kernels import in_triton_head

    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, device=logits.device)
    # No more rows at a time than the cache holds, by far.
    programs = min(rows, 2 * num_sms(logits.device) * max(1, 2**16 // columns))
    block = min(4096, max(8, 1 << (columns - 1).bit_length()))
    in_triton_head.cross_entropy[(programs,)](
        logits, targets.contiguous(), losses, logits.stride(0), ignore_index, scale, rows, programs,
        columns=columns, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return losses


def _in_place_on_cpu(logits: Tensor, targets: Tensor, ignore: int, scale: float | Tensor) -> Tensor:
    """The same a few rows at a time, so that they stay in the cache."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(logits), dtype=wide)
    rows = max(1, _PIECE // logits.size(1))
    pieces = zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True)
    for piece, target, loss in pieces:
        counts = (target != ignore)[:, None]
        chosen = torch.where(counts, target[:, None], 0)
        # A copy, whatever the type: the logits are still wanted when their place is written.
        x = piece.to(wide, copy=True)
        x -= x.logsumexp(1, keepdim=True)
        loss.copy_(torch.where(counts, -x.gather(1, chosen), 0)[:, 0])
        x.exp_()
        x.scatter_add_(1, chosen, x.new_full(chosen.shape, -1.0))
        piece.copy_(x.mul_(counts * scale))
    return losses
