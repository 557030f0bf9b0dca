"""Gradient reduction over the ranks, overlapped with the backward pass.

All gradients are in one buffer, in the order in which the backward pass computes them. In the last
micro-batch of a step, each bucket is reduced as soon as its gradients are final, as DDP does (Li et
al., "PyTorch Distributed", 2020).
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor
from typing_extensions import override

from gptforge.distributed import Comm
from gptforge.training.grad_buffer import GradBuffer

BUCKET_BYTES = 25 * 2**20
"""DDP's default. Smaller messages are bound by latency, larger ones overlap less."""


class GradReducer:
    """The interface for gradient reduction; this base class reduces only the loss.

    It is used with one rank, where it does nothing, and with FSDP, which reduces gradients itself
    in every micro-batch: reducing only in the last one (`no_sync`) would save communication, but
    full gradients take 4 bytes per parameter.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm = comm

    def reset(self) -> None:
        """Start a step, or restart one that ran out of memory before anything was sent."""

    def enable_sync(self) -> None:
        """Reduce gradients from now on: the last micro-batch comes next."""

    def grads_ready(self, num_groups: int) -> None:
        """Note that the first groups of gradients are final, if sync is enabled."""

    def has_sent(self) -> bool:
        """Whether other ranks have received anything in this step."""
        return False

    def poison(self) -> None:
        """Send the remaining gradients as NaN, so that all ranks skip this step."""

    def finish(self, loss: Tensor) -> Tensor:
        """Wait for all reductions; returns the loss summed over the ranks."""
        return self._comm.all_reduce(loss)


class BucketedAllReduce(GradReducer):
    """All-reduces a gradient buffer in buckets."""

    def __init__(self, comm: Comm, grads: GradBuffer) -> None:
        super().__init__(comm)
        self._grads = grads
        # A constant: if a rank had other buckets, collectives would add up different gradients.
        min_numel = BUCKET_BYTES // grads.flat.element_size()
        self._buckets = make_buckets(grads.group_ends, min_numel)
        self._num_sent = 0
        self._is_sync_enabled = False
        self._waits: list[Callable[[], None]] = []

    @override
    def reset(self) -> None:
        self._is_sync_enabled = False

    @override
    def enable_sync(self) -> None:
        self._is_sync_enabled = True

    @override
    def grads_ready(self, num_groups: int) -> None:
        if self._is_sync_enabled and num_groups:
            self._send_until(self._grads.group_ends[num_groups - 1])

    @override
    def has_sent(self) -> bool:
        return self._num_sent > 0

    @override
    def poison(self) -> None:
        if self._num_sent < len(self._buckets):
            # NaN propagates through the sum, so every rank sees it in its norm.
            start, _ = self._buckets[self._num_sent]
            self._grads.flat[start:].fill_(math.nan)

    @override
    def finish(self, loss: Tensor) -> Tensor:
        self._send_until(self._grads.group_ends[-1])
        loss = super().finish(loss)
        for wait in self._waits:
            wait()
        self._waits.clear()
        self._num_sent = 0
        # A dry run may happen on this rank only, so it must not start collectives.
        self._is_sync_enabled = False
        return loss

    def _send_until(self, end: int) -> None:
        while self._num_sent < len(self._buckets) and self._buckets[self._num_sent][1] <= end:
            self._waits.append(self._reduce_async(*self._buckets[self._num_sent]))
            self._num_sent += 1

    def _reduce_async(self, start: int, stop: int) -> Callable[[], None]:
        return self._comm.all_reduce_async(self._grads.flat[start:stop])


def make_buckets(ends: Sequence[int], min_size: int) -> list[tuple[int, int]]:
    """Merge adjacent ranges, given by their ends, into buckets (start, stop).

    All but the last have at least `min_size` elements.
    """
    buckets, start = [], 0
    for end in ends:
        if end - start >= min_size or (end == ends[-1] and end > start):
            buckets.append((start, end))
            start = end
    return buckets
