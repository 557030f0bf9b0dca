"""Full copies of sharded tensors (DTensor), for checkpoints and sampling.

A tensor that is not sharded is replicated on every rank; the one of rank 0 counts.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from gptforge.distributed.comm import SINGLE_PROCESS, Comm

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def gather_full_tensor(tensor: Tensor, comm: Comm = SINGLE_PROCESS) -> Tensor | None:
    """A full copy of a tensor on rank 0, None on the others; all ranks must call it.

    A sharded tensor is gathered to the CPU, as the device may have no room for all of them.
    """
    tensor = tensor.detach()
    if is_sharded(tensor):
        full: Tensor = tensor.full_tensor()
        return full.cpu() if comm.is_main else None
    return tensor.clone(memory_format=torch.contiguous_format) if comm.is_main else None


@torch.no_grad()
def copy_from_rank0(tensor: Tensor, source: Tensor | None, comm: Comm = SINGLE_PROCESS) -> None:
    """Fill a tensor, or this rank's shard of it, with rank 0's `source` (None on other ranks)."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        if source is not None:
            full.copy_(source)
        shard = distribute_tensor(full, tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(shard.to_local())
        return
    if source is not None:
        tensor.copy_(source)
    comm.broadcast(tensor)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local.detach()


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")
