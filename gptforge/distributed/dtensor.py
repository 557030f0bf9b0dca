"""Tensors that lie in pieces on all ranks, and the whole of them: for checkpoints and for writing.

A tensor that is not sharded is on every rank as a whole; rank 0's counts.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from gptforge.distributed.comm import SINGLE_PROCESS, Comm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def gather_full_tensor(tensor: Tensor, comm: Comm = SINGLE_PROCESS) -> Tensor | None:
    """A copy of a tensor on rank 0, None on the others, all of which have to ask.

    What was sharded is put together on the CPU: the device may have no room for all of it.
    """
    tensor = tensor.detach()
    if is_sharded(tensor):
        full: Tensor = tensor.full_tensor()
        return full.cpu() if comm.is_main else None
    return tensor.clone(memory_format=torch.contiguous_format) if comm.is_main else None


@torch.no_grad()
def copy_from_rank0(tensor: Tensor, source: Tensor | None, comm: Comm = SINGLE_PROCESS) -> None:
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
    comm.broadcast(tensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """The rows of a sharded tensor that lie here."""
    assert is_sharded(tensor), "it is on every rank as a whole"
    rows: Tensor = tensor.to_local().detach()
    return rows


def dtensor_from_local(local: Tensor, like: Tensor) -> Tensor:
    """A sharded tensor, cut as another one, of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    assert is_sharded(like), "there is nothing to be like"
    shard: Tensor = DTensor.from_local(
        local, like.device_mesh, like.placements,
        run_check=False, shape=like.shape, stride=like.stride(),
    )  # fmt: skip
    return shard


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor lies in pieces."""
    return hasattr(tensor, "full_tensor")
