"""A model in shards whose updates are written out: what lasts lies in pieces, what computes whole.

Of the wide weights and the optimizer's state every rank has its rows. Once an update the narrow
weights are put together, while the first blocks compute; gradients are added up as wholes over its
micro-batches, and sent to those who keep their rows while the last one is on its way back. That is
the first stage of ZeRO (Rajbhandari et al., 2020), with the wide weights in pieces as well, and
takes 6 bytes a parameter on every rank; `sharded.py` takes less, and sends weights and gradients in
every micro-batch.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptforge.distributed import Comm
from gptforge.distributed.dtensor import dtensor_from_local, local_tensor
from gptforge.train.backends.manual_layers import ComputeWeights
from gptforge.train.grad_buffer import (
    ALIGNMENT,
    GradBuffer,
    clip_coef,
    round_up,
)
from gptforge.train.parallel.fsdp import FSDPRoot
from gptforge.train.parallel.grad_reducer import BucketedAllReduce, make_buckets


class AllGatheredWeights(ComputeWeights):
    """Weights put together from all ranks' rows, once an update.

    Args:
        dtype: of the narrow copies.
        root: whose parameters lie in shards.
        ranks: who have them.
    """

    def __init__(self, dtype: torch.dtype, root: FSDPRoot, ranks: Comm) -> None:
        super().__init__(dtype)
        self._root, self._ranks = root, ranks
        root.reshard_root()
        vectors = [p for p in root.parameters() if p.dim() == 1]
        self._vectors = _Vectors(vectors, ranks)
        self._wide: dict[Tensor, Tensor] = {}
        self._narrow: dict[Tensor, Tensor] = {}
        self._waits: dict[int, Callable[[], None]] = {}

    def master(self, parameter: Tensor) -> Tensor:
        """As `Weights.wide`; matrices take memory for it."""
        if parameter.dim() == 1:
            return self._vectors.of(parameter)
        if parameter not in self._wide:
            self._wide[parameter] = self._padded(parameter, parameter.dtype)
        return self._wide[parameter][: len(parameter)]

    def compute_copy(self, parameter: Tensor) -> Tensor:
        """As `Weights.narrow`."""
        if parameter.dim() == 1 or parameter in self._wide:
            return super().compute_copy(parameter)
        assert parameter not in self._narrow, "it has its place"
        self._narrow[parameter] = self._padded(parameter, self.dtype)
        return self._narrow[parameter][: len(parameter)]

    def refresh(self) -> None:
        """As `Weights.begin`; all ranks have to."""
        self._root.reshard_root()
        self._vectors.gather()
        for wait in self._gather(self._wide).values():
            wait()
        super().refresh()
        self._waits = self._gather(self._narrow)

    def wait_for(self, *copies: Tensor) -> None:
        """As `Weights.wait_for`."""
        for copy in copies:
            wait = self._waits.pop(copy.data_ptr(), None)
            if wait is not None:
                wait()

    def _gather(self, wholes: dict[Tensor, Tensor]) -> dict[int, Callable[[], None]]:
        """Begin to put matrices together; how to wait for each, by its address."""
        pieces = [local_tensor(parameter) for parameter in wholes]
        own = [self._ranks.local_rows(whole) for whole in wholes.values()]
        torch._foreach_copy_([o[: len(p)] for o, p in zip(own, pieces, strict=True)], pieces)
        return {whole.data_ptr(): self._ranks.all_gather_async(whole) for whole in wholes.values()}

    def _padded(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        rows = padded_rows(len(parameter), self._ranks)
        return torch.zeros(rows, parameter.size(1), dtype=dtype, device=parameter.device)


class _Vectors:
    """All vectors of a model, which take one message together.

    `_pieces` holds, rank after rank, each one's numbers of every vector; `_places` says where each
    number of `_whole`, in which vector lies behind vector, is among them.

    Args:
        vectors: that lie in shards.
        ranks: who have them.
    """

    def __init__(self, vectors: Sequence[Tensor], ranks: Comm) -> None:
        self._vectors, self._ranks = vectors, ranks
        each = [padded_rows(len(v), ranks) // ranks.world_size for v in vectors]
        self._starts = [sum(each[:n]) for n in range(len(each))]
        first = vectors[0]
        self._pieces = torch.zeros(
            ranks.world_size * sum(each), dtype=first.dtype, device=first.device
        )
        places, self._found, end = [], {}, 0
        for vector, start, count in zip(vectors, self._starts, each, strict=True):
            number = torch.arange(round_up(len(vector), ALIGNMENT)).clamp(max=len(vector) - 1)
            places.append(number // count * sum(each) + start + number % count)
            self._found[vector] = slice(end, end + len(vector))
            end += len(number)
        self._places = torch.cat(places).to(first.device)
        self._whole = torch.zeros(end, dtype=first.dtype, device=first.device)

    def of(self, vector: Tensor) -> Tensor:
        """The whole of a vector, as it was last put together."""
        return self._whole[self._found[vector]]

    def gather(self) -> None:
        """Put all together, as they are now."""
        pieces, own = [local_tensor(v) for v in self._vectors], self._ranks.local_rows(self._pieces)
        places = zip(self._starts, pieces, strict=True)
        torch._foreach_copy_([own[start : start + len(p)] for start, p in places], pieces)
        self._ranks.all_gather_async(self._pieces)()
        torch.index_select(self._pieces, 0, self._places, out=self._whole)


class ShardedGradBuffer(GradBuffer):
    """Gradients of a model in shards: made as wholes, of which each rank keeps its rows."""

    def __init__(self, groups: Sequence[Sequence[Tensor]], ranks: Comm) -> None:
        self._ranks = ranks
        super().__init__(groups)
        self.matrices = {
            start: self.flat[start : start + self._size_of(group[0])].view(-1, group[0].size(1))
            for start, group in zip([0, *self.group_ends], groups, strict=False)
            if group[0].dim() > 1
        }
        """Those that are a group of their own, by where they begin; with rows that pad them."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As `Gradients.clip`, over the rows on all ranks."""
        own = [local_tensor(gradient) for gradient in self._for_optimizer.values()]
        squares = torch.stack(torch._foreach_norm(own)).square().sum()
        norm = self._ranks.all_reduce(squares).sqrt()
        torch._foreach_mul_(own, clip_coef(norm, max_norm))
        return norm

    def _size_of(self, parameter: Tensor) -> int:
        if parameter.dim() == 1:
            return parameter.numel()
        return padded_rows(len(parameter), self._ranks) * parameter.size(1)

    @functools.cached_property
    def _for_optimizer(self) -> dict[Tensor, Tensor]:
        found = {}
        for parameter, gradient in self._views.items():
            each = padded_rows(len(parameter), self._ranks) // self._ranks.world_size
            own = gradient[self._ranks.rank * each : (self._ranks.rank + 1) * each]
            found[parameter] = dtensor_from_local(own, parameter)
        return found


class BucketedReduceScatter(BucketedAllReduce):
    """Sums of gradients over the ranks, each matrix's rows only where they are kept.

    Args:
        ranks: who add up.
        gradients: where they lie.
    """

    def __init__(self, ranks: Comm, gradients: ShardedGradBuffer) -> None:
        super().__init__(ranks, gradients)
        self._matrices = gradients.matrices
        self._pieces = make_buckets(gradients.group_ends, 0)

    def _begin(self, start: int, stop: int) -> Callable[[], None]:
        if start in self._matrices:
            return self._ranks.reduce_scatter_async(self._matrices[start])
        return super()._begin(start, stop)


def padded_rows(rows: int, ranks: Comm) -> int:
    """Rows with which all ranks have as many of them; the last ones lie empty."""
    return round_up(rows, ranks.world_size)
