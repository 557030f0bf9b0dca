"""Causal self-attention, for autograd or with an explicit backward on packed q, k, v.

`causal_attention` is the model's attention, with autograd. The classes are for the manual backward:
torch's SDPA and its autograd, or cuDNN's forward with a FlashAttention-2 backward in Triton, which
writes the gradients of q, k and v packed, as the next GEMM reads them, together with their bias
gradient. With dropout the forward is Triton's too, so that the backward can recompute the mask.

Shapes: B sequences, T tokens each, N = B * T, H heads of D channels, C = H * D.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, dropout_kernel_args
from gptforge.kernels.reductions import Pending, accumulate_column_sums, accumulate_partials

MAX_MATMUL_TOKENS = 512
"""Longest sequence for `matmul_attention`: for longer ones, the (T, T) scores take too long."""
HEAD_SIZES = (32, 64)
"""Values of D for which the Triton backward was measured to be faster."""
BLOCK = 64
"""Queries or keys in a tile."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Scaled dot-product attention with a causal mask; all are (B, H, T, D)."""
    # torch's flash kernel for CPUs does not use their bfloat16 instructions: its backward takes up
    # to ten times as long as batched matmuls.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) <= MAX_MATMUL_TOKENS:
        return matmul_attention(q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """`causal_attention` by batched matmuls that materialize the (T, T) scores."""
    B, H, T, D = q.shape  # noqa: N806
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)  # (T, T)
    # One baddbmm computes, scales and masks the scores.
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)  # (B * H, T, T)
    # Autocast would convert the softmax to float32 and back.
    with torch.autocast(q.device.type, enabled=False):
        probs = F.dropout(scores.softmax(-1), dropout_p, dropout_p > 0)
        return (probs @ v).view(B, H, T, D)


class SavedAttention(NamedTuple):
    """What the backward pass needs."""

    qkv: tuple[Tensor, ...]
    """q, k and v, (B, H, T, D) each; or all of them in one (B, T, 3, H, D)."""
    out: Tensor
    """(B, H, T, D)."""
    lse: Tensor | None = None
    """(B, H, T) float32, log-sum-exp of the scores; None if autograd saves it."""
    dropout: DropoutSeed | None = None
    """Dropout of the probabilities (B, H, T, T); None if autograd saves the mask."""


class SdpaAttention:
    """torch's SDPA and its autograd, with the kernel that torch selects.

    Dropout uses torch's RNG; the seeds are ignored.
    """

    def forward(self, qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, SavedAttention]:
        """(B, T, 3, H, D) to (N, C), and what the backward needs."""
        # Leaves of a graph of one operation, which `out` keeps alive until the backward.
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))  # (B, H, T, D)
        with torch.enable_grad():
            out = causal_attention(q, k, v, 0.0 if dropout is None else dropout.p)
        return _merge_heads(out.detach()), SavedAttention((q, k, v), out)

    def backward(
        self, grad_output: Tensor, saved: SavedAttention, bias_grad: Tensor, pending: Pending = None
    ) -> Tensor:
        """(N, C) to the gradient of qkv (N, 3 * C), whose column sums are added to `bias_grad`."""
        grad_heads = _split_heads(grad_output, *saved.out.shape[:2])
        grads = torch.autograd.grad(saved.out, saved.qkv, grad_heads)
        grad_qkv = torch.cat([_merge_heads(x) for x in grads], dim=1)  # (N, 3C), a copy
        accumulate_column_sums(grad_qkv, bias_grad, pending)
        return grad_qkv


class TritonAttention:
    """Triton's backward; cuDNN's forward, or with dropout Triton's."""

    def forward(self, qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, SavedAttention]:
        """(B, T, 3, H, D) to (N, C), and what the backward needs."""
        if dropout is not None:
            out, lse = attention_forward(qkv, dropout)
            heads = _split_heads(out, qkv.size(0), qkv.size(3))
            return out, SavedAttention((qkv,), heads, lse, dropout)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each, views
        # The private operator returns the LSE for the backward; F.scaled_dot_product_attention
        # does not.
        heads, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=True
        )
        return _merge_heads(heads), SavedAttention((qkv,), heads, lse.view(heads.shape[:3]))

    def backward(
        self, grad_output: Tensor, saved: SavedAttention, bias_grad: Tensor, pending: Pending = None
    ) -> Tensor:
        """(N, C) to the gradient of qkv (N, 3 * C), whose column sums are added to `bias_grad`."""
        assert saved.lse is not None, "saved by another implementation's forward"
        grad_qkv, partials = attention_backward(
            saved.qkv[0], _merge_heads(saved.out), saved.lse, grad_output, saved.dropout
        )
        accumulate_partials(partials, bias_grad, pending)
        return grad_qkv.view(len(grad_output), -1)


PackedAttention = SdpaAttention | TritonAttention


def select_attention(
    device: torch.device, dtype: torch.dtype, *, head_size: int
) -> PackedAttention:
    """Select the implementation that was measured to be faster for these arguments."""
    has_triton_backward = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and head_size in HEAD_SIZES
        and not torch.version.hip
        # Measured on Hopper only.
        and torch.cuda.get_device_capability(device)[0] == 9
        and torch.backends.cuda.cudnn_sdp_enabled()
    )
    return TritonAttention() if has_triton_backward else SdpaAttention()


def attention_forward(qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 forward: (B, T, 3, H, D) to (N, C), and the scores' LSE (B, H, T)."""
    from gptforge.kernels.triton import attention as kernels

    B, T, _, H, D = qkv.shape  # noqa: N806
    assert qkv.is_contiguous()
    out = qkv.new_empty(B * T, H * D)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=qkv.device)
    seeds, has_dropout = dropout_kernel_args(dropout, lse)
    grid, shape = _launch_args(qkv, has_dropout)
    kernels.attn_fwd[grid](qkv, out, lse, seeds, T, D**-0.5, **shape, num_warps=4, num_stages=3)
    return out, lse


def attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, grad_output: Tensor, dropout: DropoutSeed | None = None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 backward; `out` and `grad_output` are (N, C), the rest as in the forward.

    Returns the gradient of qkv, and its sum over tokens as partial sums (P, 3 * C).
    """
    from gptforge.kernels.triton import attention as kernels

    B, T, _, H, D = qkv.shape  # noqa: N806
    assert all(x.is_contiguous() for x in (qkv, out, lse, grad_output))
    seeds, has_dropout = dropout_kernel_args(dropout, lse)
    grid, shape = _launch_args(qkv, has_dropout)
    grad_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    # A row for each tile of tokens in each sequence.
    partials = lse.new_empty(B * grid[0], 3 * H * D)
    # First, since it also writes `delta`. Capping registers lets more programs share an SM.
    kernels.attn_bwd_dq[grid](
        qkv, out, grad_output, lse, delta, grad_qkv, partials, seeds, T, D**-0.5, **shape,
        num_warps=4, num_stages=2, maxnreg=128,
    )  # fmt: skip
    kernels.attn_bwd_dkdv[grid](
        qkv, grad_output, lse, delta, grad_qkv, partials, seeds, T, D**-0.5, **shape,
        num_warps=4, num_stages=1, maxnreg=168,
    )  # fmt: skip
    return grad_qkv, partials


def _launch_args(
    qkv: Tensor, has_dropout: bool
) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    """Grid and compile-time arguments."""
    B, T, _, H, D = qkv.shape  # noqa: N806
    shape = {"H": H, "D": D, "BLOCK": BLOCK, "IS_EVEN": T % BLOCK == 0, "DROPOUT": has_dropout}
    return (math.ceil(T / BLOCK), H, B), shape


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) to (N, C)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _split_heads(x: Tensor, batch: int, heads: int) -> Tensor:
    """(N, C) to (B, H, T, D)."""
    return x.view(batch, len(x) // batch, heads, -1).transpose(1, 2)
