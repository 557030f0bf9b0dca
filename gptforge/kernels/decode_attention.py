"""Attention of one new token for each of many sequences, which goes into the memory on the way.

With many sequences a step of writing waits for its memories. torch's attention goes through all
slots under a mask; this looks at those that are filled.

Shapes: B sequences, H heads of D = C / H, S slots of the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
"""Slots that a program looks at at a time."""


def attend_next(qkv: Tensor, memory: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """What new tokens see of their own sequences and of themselves.

    Args:
        qkv: (B, 3 * C) of the new tokens.
        memory: (2, B, H, S, D) keys and values; those of the new tokens are put into their slot.
        starts: (B, 1) each sequence's first slot.
        slot: (1,) that of all new tokens; they look from their start up to here.

    Returns:
        (B, C), in qkv's type.
    """
    by = by_triton if qkv.is_cuda else by_torch
    return by(qkv, memory, starts, slot)


def by_torch(qkv: Tensor, memory: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """`attend_next`, plainly, on any device."""
    _, B, H, S, D = memory.shape  # noqa: N806
    q, k, v = qkv.view(B, 3, H, 1, D).to(memory.dtype).unbind(1)
    memory[0].index_copy_(2, slot, k)
    memory[1].index_copy_(2, slot, v)
    slots = torch.arange(S, device=qkv.device)
    seen = (slots >= starts) & (slots <= slot)  # (B, S)
    out = F.scaled_dot_product_attention(q, memory[0], memory[1], attn_mask=seen[:, None, None])
    return out.flatten(1).to(qkv.dtype)


def by_triton(qkv: Tensor, memory: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """`attend_next` on a CUDA device, for what `fits_many`."""
    # Importing Triton takes a second, so it waits until here.
    from gptforge.kernels import in_triton_decode

    _, B, H, _, D = memory.shape  # noqa: N806
    assert qkv.is_contiguous() and starts.is_contiguous()
    out = torch.empty(B, H * D, dtype=qkv.dtype, device=qkv.device)
    in_triton_decode.attend_next[(B, H)](
        qkv, memory, starts, slot, out, D**-0.5, *memory.stride()[:3], H,
        size=D, BLOCK=1 << (D - 1).bit_length(), TILE=TILE,
    )  # fmt: skip
    return out


def fits_many(memory: Tensor) -> bool:
    """Whether `attend_next` may be tried on a GPU with such a cache, (layers, 2, B, H, S, D)."""
    return (
        memory.is_cuda
        and torch.version.hip is None
        # Kernels start on the current device.
        and memory.device.index == torch.cuda.current_device()
        and 16 <= memory.size(-1) <= 128
    )
