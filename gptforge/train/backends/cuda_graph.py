"""An update's kernels recorded once and played back: CUDA graphs.

In a small model a kernel takes less time than it takes Python to ask for it. A recording is asked
for as a whole. It plays back at the same addresses: so the batch is copied to where that one was,
and gradients go where those went.

There are three, for an update may have many micro-batches, and other ranks to wait for in between:
of what begins it, of a micro-batch, and of what ends it.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gptforge.train.backends.manual import ManualBackend
from gptforge.train.optimizer_step import OptimizerStep

T = TypeVar("T")


class CudaGraphBackend:
    """`by_hand`, recorded at its second call with a shape: the first one warms everything up."""

    def __init__(self, by_hand: ManualBackend) -> None:
        self._backend = by_hand
        self._scale = torch.zeros((), device=by_hand.grads.flat.device)
        self._recorded: dict[torch.Size, Callable[[Tensor, Tensor], Tensor]] = {}
        self._seen: set[torch.Size] = set()
        self._begin = _CapturedCall(by_hand.zero_grad)
        self._hands_over = True

    def zero_grad(self) -> None:
        """As `ByHand.begin`."""
        self._begin()
        if self._hands_over:
            self._backend.grads.assign_grads()

    def capture_optimizer_step(self, descend: OptimizerStep) -> "CudaGraphOptimizerStep":
        """The same for what ends an update; gradients are handed over there from now on."""
        self._hands_over = False
        return CudaGraphOptimizerStep(descend, self._backend)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As `ByHand.clip`."""
        return self._backend.clip_grad_norm_(max_norm)

    def __call__(self, idx: Tensor, targets: Tensor, scale: float) -> Tensor:
        """As `ByHand.__call__`."""
        if idx.shape not in self._seen:
            self._seen.add(idx.shape)
            return self._backend(idx, targets, scale)
        self._scale.fill_(scale)
        if idx.shape not in self._recorded:
            self._recorded[idx.shape] = self._record(idx, targets)
        return self._recorded[idx.shape](idx, targets)

    def release_graphs(self) -> None:
        """Give the memory of the recordings of micro-batches back."""
        self._recorded.clear()
        self._seen.clear()

    def _record(self, idx: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        fixed_idx, fixed_targets = idx.clone(), targets.clone()
        graph, loss = _capture(lambda: self._backend(fixed_idx, fixed_targets, self._scale))

        def play(idx: Tensor, targets: Tensor) -> Tensor:
            fixed_idx.copy_(idx)
            fixed_targets.copy_(targets)
            graph.replay()
            return loss.clone()

        return play


class CudaGraphOptimizerStep:
    """A descent, recorded at its second call; for an optimizer that takes a rate on the device."""

    def __init__(self, descend: OptimizerStep, by_hand: ManualBackend) -> None:
        device = by_hand.grads.flat.device
        self._loss, self._lr = loss, lr = [torch.zeros((), device=device) for _ in range(2)]

        # It holds nothing of this object, so that both go when the update does.
        def end() -> Tensor:
            by_hand.grads.assign_grads()
            return descend(by_hand.clip_grad_norm_, loss, lr)

        self._end = _CapturedCall(end)

    def __call__(self, loss: Tensor, lr: float) -> Tensor:
        """As `Descent.__call__`."""
        self._loss.copy_(loss)
        # From the first call on, not only in a recording: as float32 it is a little another number.
        self._lr.fill_(lr)
        return self._end().clone()


class _CapturedCall(Generic[T]):
    """Work at fixed addresses, recorded when it is done for the second time."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._is_warm = False
        self._recorded: tuple[torch.cuda.CUDAGraph, T] | None = None

    def __call__(self) -> T:
        if not self._is_warm:
            self._is_warm = True
            return self._work()
        if self._recorded is None:
            self._recorded = _capture(self._work)
        graph, result = self._recorded
        graph.replay()
        return result


def _capture(work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A recording of some work, which is not done yet, and where it leaves its result."""
    graph = torch.cuda.CUDAGraph()
    # Another thread may be writing a checkpoint, and ask for memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result
