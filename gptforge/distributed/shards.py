"""Tensors that lie in pieces on all ranks, and the whole of them: for checkpoints and for writing.

A tensor that is not sharded is on every rank as a whole; rank 0's counts.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from gptforge.distributed.ranks import ALONE, Ranks

if TYPE_CHECKING:
    # Half a second to load: for those who shard.
    from torch.distributed.tensor import DTensor


def whole(tensor: Tensor, ranks: Ranks = ALONE) -> Tensor | None:
    """A copy of a tensor on rank 0, None on the others, all of which have to ask.

    What was sharded is put together on the CPU: the device may have no room for all of it.
    """
    tensor = tensor.detach()
    if is_sharded(tensor):
        full: Tensor = tensor.full_tensor()
        return full.cpu() if ranks.is_first else None
    return tensor.clone(memory_format=torch.contiguous_format) if ranks.is_first else None


@torch.no_grad()
def fill(tensor: Tensor, source: Tensor | None, ranks: Ranks = ALONE) -> None:
    """Give a tensor the values that rank 0 has in `source`, on every rank its own part of them."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if source is not None:
            full.copy_(source)
        own = distribute_tensor(full, tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(own.to_local())
        return
    if source is not None:
        tensor.copy_(source)
    ranks.broadcast(tensor)


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie here."""
    assert is_sharded(tensor), "it is on every rank as a whole"
    rows: Tensor = tensor.to_local().detach()
    return rows


def as_shard(rows: Tensor, like: Tensor) -> Tensor:
    """A sharded tensor, cut as another one, of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    assert is_sharded(like), "there is nothing to be like"
    shard: Tensor = DTensor.from_local(
        rows, like.device_mesh, like.placements,
        run_check=False, shape=like.shape, stride=like.stride(),
    )  # fmt: skip
    return shard


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor lies in pieces."""
    return hasattr(tensor, "full_tensor")
