"""Causal attention over q, k and v side by side, with its way back called by hand.

Two ways: torch's attention and its autograd; or cuDNN's way forward and a way back of our own in
Triton (in_triton_attention.py), which writes the three gradients side by side, where they are
wanted, with their sums for the bias. With dropout both ways are ours: then the mask is made again
on the way back. docs/results/gpu-speed.md has what it gains.

Shapes: B windows, T tokens each, N = B * T, H heads of D channels, C = H * D.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, dropout_kernel_args
from gptforge.kernels.layer_norm import _block_kernels
from gptforge.kernels.reductions import PendingReductions, accumulate_partials

MAX_MATMUL_TOKENS = 512
"""Tokens up to which the (T, T) scores are made: beyond, their memory outweighs the gain."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Each token's mix of the values up to its own; all (B, H, T, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) <= MAX_MATMUL_TOKENS:
        return matmul_attention(q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """The same from batched matrix products, the scores written out."""
    B, H, T, D = q.shape  # noqa: N806
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    future = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    # One product makes the scores, scales them and rules the future out.
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=D**-0.5)
    # Autocast would turn them into float32, and back.
    with torch.autocast(q.device.type, enabled=False):
        shares = F.dropout(scores.softmax(-1), dropout_p, dropout_p > 0)
        return (shares @ v).view(B, H, T, D)


def pack_qkv(
    q: Tensor, k: Tensor, v: Tensor, bias_grad: Tensor, pending: PendingReductions | None = None
) -> Tensor:
    """(N, 3 * C) from three (N, C); `sums` (3 * C,) grows by its sum over the rows."""
    if q.is_cuda:
        return _pack_qkv_cuda(q, k, v, bias_grad, pending)
    out = torch.cat([q, k, v], dim=1)
    bias_grad += out.sum(0, dtype=bias_grad.dtype)
    return out


def _pack_qkv_cuda(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, unfinished: PendingReductions | None
) -> Tensor:
    rows, columns = q.shape
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    out = torch.empty(rows, 3 * columns, dtype=q.dtype, device=q.device)
    programs = min(256, math.ceil(rows / 64))
    parts = torch.empty(programs, 3 * columns, dtype=torch.float32, device=q.device)
    _block_kernels().pack[(programs, math.ceil(columns / 512), 3)](
        q, k, v, out, parts, rows, math.ceil(rows / programs), columns, BLOCK=512, ROWS=16,
    )  # fmt: skip
    accumulate_partials(parts, sums, unfinished)
    return out


HEAD_SIZES = (32, 64)
"""Channels of a head for which the way back of our own was found to be faster."""
BLOCK = 64
"""Tokens that it works on at a time."""


class SavedAttention(NamedTuple):
    """What the way back needs besides what went in."""

    qkv: tuple[Tensor, ...]
    """q, k and v, (B, H, T, D) each, or all of them in one (B, T, 3, H, D)."""
    out: Tensor
    """(B, H, T, D)"""
    lse: Tensor | None = None
    """(B, H, T) float32, logarithms of the softmax's sums, where autograd does not keep them."""
    dropout: DropoutSeed | None = None
    """What was dropped from the shares (B, H, T, T), where autograd does not keep it."""


class PackedAttention(Protocol):
    """Both ways through attention."""

    def forward(self, qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, SavedAttention]:
        """(B, T, 3, H, D) to (N, C), with some of the shares dropped."""

    def backward(
        self,
        grad_output: Tensor,
        saved: SavedAttention,
        bias_grad: Tensor,
        pending: PendingReductions | None = None,
    ) -> Tensor:
        """(N, C) to the gradient of qkv (N, 3 * C), whose column sums are added to `sums`."""


class SdpaAttention:
    """torch picks the kernel, and its autograd knows that kernel's way back.

    It drops by dice of its own, whatever `drop` says.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        self._dropout = dropout

    def forward(self, qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, SavedAttention]:
        """As `PackedAttention.forward`."""
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
        with torch.enable_grad():
            out = causal_attention(q, k, v, self._dropout)
        return _merge_heads(out.detach()), SavedAttention((q, k, v), out)

    def backward(
        self,
        grad_output: Tensor,
        saved: SavedAttention,
        bias_grad: Tensor,
        pending: PendingReductions | None = None,
    ) -> Tensor:
        """As `PackedAttention.backward`."""
        outs = torch.autograd.grad(
            saved.out, saved.qkv, _split_heads(grad_output, *saved.out.shape[:2])
        )
        to_q, to_k, to_v = (_merge_heads(x) for x in outs)
        return pack_qkv(to_q, to_k, to_v, bias_grad, pending)


class TritonAttention:
    """Triton back; forward too where anything is dropped, otherwise cuDNN."""

    def forward(self, qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, SavedAttention]:
        """As `PackedAttention.forward`."""
        if dropout is not None:
            rows, lse = attention_forward(qkv, dropout)
            return rows, SavedAttention(
                (qkv,), _split_heads(rows, qkv.size(0), qkv.size(3)), lse, dropout
            )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=True
        )
        return _merge_heads(out), SavedAttention((qkv,), out, lse.view(out.shape[:3]))

    def backward(
        self,
        grad_output: Tensor,
        saved: SavedAttention,
        bias_grad: Tensor,
        pending: PendingReductions | None = None,
    ) -> Tensor:
        """As `PackedAttention.backward`."""
        assert saved.lse is not None, "the way forward was another one"
        gradient, parts = attention_backward(
            saved.qkv[0], _merge_heads(saved.out), saved.lse, grad_output, saved.dropout
        )
        accumulate_partials(parts, bias_grad, pending)
        return gradient.view(len(grad_output), -1)


def attention_forward(qkv: Tensor, dropout: DropoutSeed | None) -> tuple[Tensor, Tensor]:
    """Attention (N, C) over q, k and v (B, T, 3, H, D), and logarithms of its sums (B, H, T)."""
    count, length, _, heads, size = qkv.shape
    assert qkv.is_contiguous()
    out = qkv.new_empty(count * length, heads * size)
    lse = torch.empty(count, heads, length, dtype=torch.float32, device=qkv.device)
    keys, dropped = dropout_kernel_args(dropout, lse)
    grid, shape = _launch_args(qkv, dropped)
    _attention_kernels().forward[grid](
        qkv, out, lse, keys, length, size**-0.5, **shape, num_warps=4, num_stages=3
    )
    return out, lse


def attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, grad_output: Tensor, dropout: DropoutSeed | None = None
) -> tuple[Tensor, Tensor]:
    """The gradient of q, k and v (B, T, 3, H, D), and sums over its tokens, in parts (P, 3 * C).

    Args:
        qkv: (B, T, 3, H, D).
        out: (N, C), of the way forward.
        lse: (B, H, T) float32, logarithms of the softmax's sums.
        upstream: (N, C), the gradient of `out`.
        drop: what the way forward dropped.
    """
    count, _, _, heads, size = qkv.shape
    assert all(x.is_contiguous() for x in (qkv, out, lse, grad_output))
    keys, dropped = dropout_kernel_args(dropout, lse)
    grid, shape = _launch_args(qkv, dropped)
    gradient, delta = torch.empty_like(qkv), torch.empty_like(lse)
    parts = lse.new_empty(count * grid[0], 3 * heads * size)
    # Held to so many registers, more of its programs run beside each other.
    kernels = _attention_kernels()
    kernels.to_queries[grid](
        qkv, out, grad_output, lse, delta, gradient, parts, keys, qkv.size(1), size**-0.5, **shape,
        num_warps=4, num_stages=2, maxnreg=128,
    )  # fmt: skip
    kernels.to_keys[grid](
        qkv, grad_output, lse, delta, gradient, parts, keys, qkv.size(1), size**-0.5, **shape,
        num_warps=4, num_stages=1, maxnreg=168,
    )  # fmt: skip
    return gradient, parts


def _launch_args(qkv: Tensor, dropped: int) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    count, length, _, heads, size = qkv.shape
    shape = {"H": heads, "D": size, "BLOCK": BLOCK, "IS_EVEN": length % BLOCK == 0}
    return (math.ceil(length / BLOCK), heads, count), {**shape, "DROPPED": dropped}


def select_attention(
    device: torch.device, dtype: torch.dtype, *, head_size: int, dropout: float
) -> PackedAttention:
    """The fastest way that was measured for this."""
    is_ours = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and head_size in HEAD_SIZES
        and not torch.version.hip
        # Tried on Hopper GPUs only.
        and torch.cuda.get_device_capability(device)[0] == 9
        and torch.backends.cuda.cudnn_sdp_enabled()
    )
    return TritonAttention() if is_ours else SdpaAttention(dropout)


def _merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D) to (N, C)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _split_heads(x: Tensor, count: int, heads: int) -> Tensor:
    """(N, C) to (B, H, T, D)."""
    return x.view(count, len(x) // count, heads, -1).transpose(1, 2)


def _attention_kernels() -> Any:
    """The kernels; importing Triton takes a second, so it waits until here."""
    from gptforge.kernels import in_triton_attention

    return in_triton_attention
