"""ZeRO stage 1 for the manual backward, with the master weights sharded as well.

Every rank keeps its rows of the fp32 weights and of the optimizer state. Once a step, the weights
are all-gathered in the compute dtype while the first blocks run. Full gradients are accumulated
over the micro-batches, and reduce-scattered during the last one's backward pass.

Each rank holds 6 bytes per parameter, 2 for the bf16 copy and 4 for the gradient, besides its shard
of 12 bytes for weights and optimizer state (Rajbhandari et al., "ZeRO", 2020). `fsdp.py` takes less
memory, but sends weights and gradients in every micro-batch.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from gptforge.distributed import Comm
from gptforge.distributed.dtensor import is_sharded, local_tensor
from gptforge.training.backends.manual_layers import ComputeWeights
from gptforge.training.grad_buffer import ALIGNMENT, GradBuffer, clip_coef, round_up
from gptforge.training.parallel.fsdp import FSDPRoot
from gptforge.training.parallel.grad_reducer import BucketedAllReduce, make_buckets


class AllGatheredWeights(ComputeWeights):
    """Full weights in a compute dtype, all-gathered from the ranks' shards once a step."""

    def __init__(self, dtype: torch.dtype, root: FSDPRoot, comm: Comm) -> None:
        super().__init__(dtype)
        self._root, self._comm = root, comm
        root.reshard_root()
        # Biases and norms are 0.1% of the parameters but most of the tensors: one message for all.
        vectors = [p for p in root.parameters() if p.dim() == 1]
        self._vectors = _GatheredVectors(vectors, comm)
        self._master: dict[Tensor, Tensor] = {}
        self._compute: dict[Tensor, Tensor] = {}
        self._waits: dict[int, Callable[[], None]] = {}

    @override
    def master(self, parameter: Tensor) -> Tensor:
        if parameter.dim() == 1:
            return self._vectors.view(parameter)
        if parameter not in self._master:
            self._master[parameter] = self._padded(parameter, parameter.dtype)
        return self._master[parameter][: len(parameter)]

    @override
    def compute_copy(self, parameter: Tensor) -> Tensor:
        if parameter.dim() == 1 or parameter in self._master:
            return super().compute_copy(parameter)
        assert parameter not in self._compute, "called twice for a parameter"
        self._compute[parameter] = self._padded(parameter, self.dtype)
        return self._compute[parameter][: len(parameter)]

    @override
    def full(self, parameter: Tensor) -> Tensor:
        if parameter in self._master:
            return self.master(parameter)
        return self.compute_copy(parameter)

    @override
    def refresh(self) -> None:
        """Gather the weights; a collective. Matrices arrive later: see `wait_for`."""
        self._root.reshard_root()
        self._vectors.gather()
        # Embeddings are used first, and in fp32: wait for them now.
        for wait in self._all_gather(self._master).values():
            wait()
        super().refresh()
        # Asynchronous: each block waits for its matrices when it runs.
        self._waits = self._all_gather(self._compute)

    @override
    def wait_for(self, *copies: Tensor) -> None:
        for copy in copies:
            wait = self._waits.pop(copy.data_ptr(), None)
            if wait is not None:
                wait()

    def _all_gather(self, full: dict[Tensor, Tensor]) -> dict[int, Callable[[], None]]:
        """Start to gather matrices; returns functions that wait for them, by address."""
        shards = [local_tensor(parameter) for parameter in full]
        rows = [self._comm.local_rows(tensor) for tensor in full.values()]
        # Each rank writes its rows in place, where the all-gather expects its input: no extra copy.
        torch._foreach_copy_([r[: len(s)] for r, s in zip(rows, shards, strict=True)], shards)
        return {t.data_ptr(): self._comm.all_gather_async(t) for t in full.values()}

    def _padded(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        rows = padded_rows(len(parameter), self._comm)
        return torch.zeros(rows, parameter.size(1), dtype=dtype, device=parameter.device)


class _GatheredVectors:
    """All biases and norm weights of a model, gathered in one message.

    `_gathered` holds each rank's shards of every vector, rank after rank. `_index` maps each
    element of `_full`, vector after vector, to its index in `_gathered`.
    """

    def __init__(self, vectors: Sequence[Tensor], comm: Comm) -> None:
        self._vectors, self._comm = vectors, comm
        shard_sizes = [padded_rows(len(v), comm) // comm.world_size for v in vectors]
        rank_size = sum(shard_sizes)
        self._offsets = [sum(shard_sizes[:i]) for i in range(len(vectors))]
        first = vectors[0]
        self._gathered = torch.zeros(
            comm.world_size * rank_size, dtype=first.dtype, device=first.device
        )
        index, self._slices, end = [], {}, 0
        for vector, offset, size in zip(vectors, self._offsets, shard_sizes, strict=True):
            # Padded, so that each vector in `_full` is aligned.
            i = torch.arange(round_up(len(vector), ALIGNMENT)).clamp(max=len(vector) - 1)
            index.append(i // size * rank_size + offset + i % size)
            self._slices[vector] = slice(end, end + len(vector))
            end += len(i)
        self._index = torch.cat(index).to(first.device)
        self._full = torch.zeros(end, dtype=first.dtype, device=first.device)

    def view(self, vector: Tensor) -> Tensor:
        """Return the view of a full vector; `gather` updates it."""
        return self._full[self._slices[vector]]

    def gather(self) -> None:
        """Gather all vectors from the ranks."""
        shards = [local_tensor(v) for v in self._vectors]
        local = self._comm.local_rows(self._gathered)
        slots = zip(self._offsets, shards, strict=True)
        torch._foreach_copy_([local[start : start + len(s)] for start, s in slots], shards)
        self._comm.all_gather_async(self._gathered)()
        torch.index_select(self._gathered, 0, self._index, out=self._full)


class ShardedGradBuffer(GradBuffer):
    """Full gradients of a sharded model; the optimizer gets views of this rank's rows."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], comm: Comm) -> None:
        self._comm = comm
        super().__init__(groups)
        self.matrices = {
            start: self.flat[start : start + self._numel(group[0])].view(-1, group[0].size(1))
            for start, group in zip([0, *self.group_ends], groups, strict=False)
            if group[0].dim() > 1
        }
        """Matrices with their padding rows, by offset; each is a separate group."""

    @override
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        # After the reduce-scatter only this rank's rows are sums; the others are stale.
        shards = [local_tensor(grad) for grad in self._optimizer_grads.values()]
        # All parameters are sharded, so the squared norms of the ranks add up to the global one.
        squares = torch.stack(torch._foreach_norm(shards)).square().sum()
        norm = self._comm.all_reduce(squares).sqrt()
        torch._foreach_mul_(shards, clip_coef(norm, max_norm))
        return norm

    @override
    def _numel(self, parameter: Tensor) -> int:
        if parameter.dim() == 1:
            return parameter.numel()
        return padded_rows(len(parameter), self._comm) * parameter.size(1)

    @functools.cached_property
    def _optimizer_grads(self) -> dict[Tensor, Tensor]:
        from torch.distributed.tensor import DTensor

        found: dict[Tensor, Tensor] = {}
        for parameter, grad in self._views.items():
            assert is_sharded(parameter)
            size = padded_rows(len(parameter), self._comm) // self._comm.world_size
            shard = grad[self._comm.rank * size : (self._comm.rank + 1) * size]
            found[parameter] = DTensor.from_local(
                shard, parameter.device_mesh, parameter.placements,
                run_check=False, shape=parameter.shape, stride=parameter.stride(),
            )  # fmt: skip
        return found


class BucketedReduceScatter(BucketedAllReduce):
    """Reduce-scatters matrices: each rank gets the sums of its rows. The rest is all-reduced."""

    def __init__(self, comm: Comm, grads: ShardedGradBuffer) -> None:
        super().__init__(comm, grads)
        self._matrices = grads.matrices
        # One group per bucket: a reduce-scatter by rows takes one matrix at a time.
        self._buckets = make_buckets(grads.group_ends, 0)

    @override
    def _reduce_async(self, start: int, stop: int) -> Callable[[], None]:
        if start in self._matrices:
            return self._comm.reduce_scatter_async(self._matrices[start])
        return super()._reduce_async(start, stop)


def padded_rows(rows: int, comm: Comm) -> int:
    """Number of rows, rounded up to a multiple of the world size."""
    return round_up(rows, comm.world_size)
