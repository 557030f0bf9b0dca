"""The output layer and its loss in one: the gradient takes the place of the logits.

The logits are the largest tensor of a GPT-2: 3.3 GB for 32,768 tokens in bfloat16. A plain
cross-entropy writes them, reads them for the loss, and writes as many gradients, on a CPU three
times over in float32. Here each row is read, and its gradient left where it was; the second look at
a row comes from the cache. On a GPU that is one kernel, on a CPU plain torch, a few rows at a time.
Known from Liger Kernel (Hsu et al., 2024) and llm.c; unlike Liger's, the rows are not cut into
chunks, which costs large matrix products their speed.

Shapes: N tokens, C channels, V rows of the token table.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.errors import RunError


def head_loss_reference(hidden: Tensor, table: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """What `head_loss` computes, in plain torch."""
    logits = F.linear(hidden, table.to(hidden.dtype))
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="sum")


def head_loss(hidden: Tensor, table: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Cross-entropy of `hidden @ table.T` against `targets`, in nats, summed over the tokens.

    Args:
        hidden: (N, C) bfloat16, on a CUDA device or a CPU.
        table: (V, C) float32; its gradient is summed in float32 too.
        targets: (N,) ids; those equal to `ignore` count for nothing.
        ignore: the id that is no target.

    Returns:
        A float32 scalar.

    Raises:
        RunError: on a GPU, if Triton is missing; `trouble` finds out beforehand.
    """
    loss: Tensor = _HeadLoss.apply(hidden, table, targets, ignore)  # type: ignore[no-untyped-call]
    return loss


def trouble(device: torch.device) -> str:
    """Why the kernel does not run on a GPU, found out by running it; empty if it does.

    Triton may be missing, or find no compiler or a driver too old; it raises whatever it likes.
    """
    try:
        logits = torch.zeros(2, 64, dtype=torch.bfloat16, device=device)
        cross_entropy_in_place(logits, torch.zeros(2, dtype=torch.int64, device=device), -1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ""


_PIECE = 2**20
"""Logits that a CPU works on at a time: 4 MB of float32."""


class _HeadLoss(torch.autograd.Function):
    """Autograd's view of it: the forward pass leaves the logits' gradient for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, ignore: int) -> Tensor:
        narrow = table.to(hidden.dtype)
        logits = hidden @ narrow.t()  # (N, V)
        in_place = cross_entropy_in_place if logits.is_cuda else cross_entropy_in_place_on_cpu
        losses = in_place(logits, targets, ignore)
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


def cross_entropy_in_place_on_cpu(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """As `cross_entropy_in_place`, a few rows at a time, so that they stay in the cache."""
    losses = torch.empty(len(logits), dtype=torch.float32)
    rows = max(1, _PIECE // logits.size(1))
    pieces = zip(logits.split(rows), targets.split(rows), losses.split(rows), strict=True)
    for piece, target, loss in pieces:
        counts = (target != ignore)[:, None]
        chosen = torch.where(counts, target[:, None], 0)
        x = piece.float()
        x -= x.logsumexp(1, keepdim=True)
        loss.copy_(torch.where(counts, -x.gather(1, chosen), 0)[:, 0])
        x.exp_()
        x.scatter_add_(1, chosen, x.new_full(chosen.shape, -1.0))
        piece.copy_(x.mul_(counts))
    return losses


def cross_entropy_in_place(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Losses (N,) float32 of logits (N, V), which become the gradient of the losses' sum."""
    rows, columns = logits.shape
    assert logits.stride(1) == 1, "rows must lie together"
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel()[(rows,)](
        logits, targets.contiguous(), losses, logits.stride(0), ignore, columns=columns, BLOCK=4096,
        num_warps=8,
    )  # fmt: skip
    return losses


@cache
def _kernel() -> Any:
    """The kernel, made when it is first wanted: importing Triton takes a second."""
    try:
        import triton
        import triton.language as tl
    except ImportError:
        raise RunError("the fused loss needs Triton, which is not installed") from None

    # Triton looks names up in the module, not in this function.
    globals()["tl"] = tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(logits, targets, losses, stride, ignore, columns: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * stride
        target = tl.load(targets + row)
        lanes = tl.arange(0, BLOCK)
        # Maximum and sum of exponentials for each lane by itself, put together at the end.
        top = tl.full((BLOCK,), -3.4e38, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, columns, BLOCK):
            place = begin + lanes
            x = tl.load(start + place, mask=place < columns, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, x)
            total = total * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
        highest = tl.max(top, 0)
        total_sum = tl.sum(total * tl.exp(top - highest), 0)
        counts = target != ignore
        chosen = tl.where(counts, target, 0)
        right = tl.load(start + chosen).to(tl.float32)
        loss = tl.log(total_sum) + (highest - right)
        tl.store(losses + row, tl.where(counts, loss, 0.0))
        weight = tl.where(counts, 1.0, 0.0)
        share = weight / total_sum
        # The target's own column is read above before any thread may write it.
        tl.debug_barrier()
        for begin in range(0, columns, BLOCK):
            place = begin + lanes
            x = tl.load(start + place, mask=place < columns, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(x - highest) * share - tl.where(place == chosen, weight, 0.0)
            tl.store(start + place, gradient.to(logits.dtype.element_ty), mask=place < columns)

    return kernel
