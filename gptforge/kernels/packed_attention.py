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
from torch import Tensor

from gptforge.kernels.attention import attend
from gptforge.kernels.block import pack
from gptforge.kernels.dropout import Drop, for_kernel
from gptforge.kernels.sums import Unfinished, add_parts

HEAD_SIZES = (32, 64)
"""Channels of a head for which the way back of our own was found to be faster."""
BLOCK = 64
"""Tokens that it works on at a time."""


class Kept(NamedTuple):
    """What the way back needs besides what went in."""

    qkv: tuple[Tensor, ...]
    """q, k and v, (B, H, T, D) each, or all of them in one (B, T, 3, H, D)."""
    out: Tensor
    """(B, H, T, D)"""
    lse: Tensor | None = None
    """(B, H, T) float32, logarithms of the softmax's sums, where autograd does not keep them."""
    drop: Drop | None = None
    """What was dropped from the shares (B, H, T, T), where autograd does not keep it."""


class PackedAttention(Protocol):
    """Both ways through attention."""

    def forward(self, qkv: Tensor, drop: Drop | None) -> tuple[Tensor, Kept]:
        """(B, T, 3, H, D) to (N, C), with some of the shares dropped."""

    def backward(
        self, upstream: Tensor, kept: Kept, sums: Tensor, unfinished: Unfinished | None = None
    ) -> Tensor:
        """(N, C) to the gradient of qkv (N, 3 * C), whose column sums are added to `sums`."""


class ByTorch:
    """torch picks the kernel, and its autograd knows that kernel's way back.

    It drops by dice of its own, whatever `drop` says.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        self._dropout = dropout

    def forward(self, qkv: Tensor, drop: Drop | None) -> tuple[Tensor, Kept]:
        """As `PackedAttention.forward`."""
        q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4))
        with torch.enable_grad():
            out = attend(q, k, v, self._dropout)
        return _rows(out.detach()), Kept((q, k, v), out)

    def backward(
        self, upstream: Tensor, kept: Kept, sums: Tensor, unfinished: Unfinished | None = None
    ) -> Tensor:
        """As `PackedAttention.backward`."""
        outs = torch.autograd.grad(kept.out, kept.qkv, _heads(upstream, *kept.out.shape[:2]))
        to_q, to_k, to_v = (_rows(x) for x in outs)
        return pack(to_q, to_k, to_v, sums, unfinished)


class ByTriton:
    """Triton back; forward too where anything is dropped, otherwise cuDNN."""

    def forward(self, qkv: Tensor, drop: Drop | None) -> tuple[Tensor, Kept]:
        """As `PackedAttention.forward`."""
        if drop is not None:
            rows, lse = attention_forward(qkv, drop)
            return rows, Kept((qkv,), _heads(rows, qkv.size(0), qkv.size(3)), lse, drop)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=True
        )
        return _rows(out), Kept((qkv,), out, lse.view(out.shape[:3]))

    def backward(
        self, upstream: Tensor, kept: Kept, sums: Tensor, unfinished: Unfinished | None = None
    ) -> Tensor:
        """As `PackedAttention.backward`."""
        assert kept.lse is not None, "the way forward was another one"
        gradient, parts = attention_backward(
            kept.qkv[0], _rows(kept.out), kept.lse, upstream, kept.drop
        )
        add_parts(parts, sums, unfinished)
        return gradient.view(len(upstream), -1)


def attention_forward(qkv: Tensor, drop: Drop | None) -> tuple[Tensor, Tensor]:
    """Attention (N, C) over q, k and v (B, T, 3, H, D), and logarithms of its sums (B, H, T)."""
    count, length, _, heads, size = qkv.shape
    assert qkv.is_contiguous()
    out = qkv.new_empty(count * length, heads * size)
    lse = torch.empty(count, heads, length, dtype=torch.float32, device=qkv.device)
    keys, dropped = for_kernel(drop, lse)
    grid, shape = _grid_and_shape(qkv, dropped)
    _triton().forward[grid](
        qkv, out, lse, keys, length, size**-0.5, **shape, num_warps=4, num_stages=3
    )
    return out, lse


def attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, upstream: Tensor, drop: Drop | None = None
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
    assert all(x.is_contiguous() for x in (qkv, out, lse, upstream))
    keys, dropped = for_kernel(drop, lse)
    grid, shape = _grid_and_shape(qkv, dropped)
    gradient, delta = torch.empty_like(qkv), torch.empty_like(lse)
    parts = lse.new_empty(count * grid[0], 3 * heads * size)
    # Held to so many registers, more of its programs run beside each other.
    kernels = _triton()
    kernels.to_queries[grid](
        qkv, out, upstream, lse, delta, gradient, parts, keys, qkv.size(1), size**-0.5, **shape,
        num_warps=4, num_stages=2, maxnreg=128,
    )  # fmt: skip
    kernels.to_keys[grid](
        qkv, upstream, lse, delta, gradient, parts, keys, qkv.size(1), size**-0.5, **shape,
        num_warps=4, num_stages=1, maxnreg=168,
    )  # fmt: skip
    return gradient, parts


def _grid_and_shape(
    qkv: Tensor, dropped: int
) -> tuple[tuple[int, int, int], dict[str, int | bool]]:
    count, length, _, heads, size = qkv.shape
    shape = {"H": heads, "D": size, "BLOCK": BLOCK, "IS_EVEN": length % BLOCK == 0}
    return (math.ceil(length / BLOCK), heads, count), {**shape, "DROPPED": dropped}


def fastest(
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
    return ByTriton() if is_ours else ByTorch(dropout)


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, D) to (N, C)."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _heads(x: Tensor, count: int, heads: int) -> Tensor:
    """(N, C) to (B, H, T, D)."""
    return x.view(count, len(x) // count, heads, -1).transpose(1, 2)


def _triton() -> Any:
    """The kernels; importing Triton takes a second, so it waits until here."""
    from gptforge.kernels import in_triton_attention

    return in_triton_attention
