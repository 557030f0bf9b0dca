"""The manual backend and the optimizer step as CUDA graphs.

In a small model, launching a kernel from Python takes longer than running it. A graph launches all
kernels at once, at fixed addresses: each batch is copied into the captured input tensors, and
gradients stay in their buffer.

There are three graphs: zeroing the gradients, a micro-batch, and the optimizer step. A single graph
would fix the number of micro-batches, and could not reduce gradients in between.
"""

from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gptforge.cuda_capture import cuda_graph_capture
from gptforge.optim.ema import WeightEMA
from gptforge.training.backends.manual import ManualBackend

T = TypeVar("T")


class CudaGraphBackend:
    """A `ManualBackend`, captured at the second call with a shape; the first call is the warmup.

    Gradients are in the backend's buffer; `CudaGraphOptimizerStep` assigns them to the parameters.
    """

    def __init__(self, backend: ManualBackend) -> None:
        self._backend = backend
        self.name = f"{backend.name}, CUDA graph"
        self._scale = torch.zeros((), device=backend.grads.flat.device)
        self._micro_batches: dict[torch.Size, tuple[Tensor, Tensor, _CapturedCall[Tensor]]] = {}
        self._zero_grad = _CapturedCall(backend.zero_grad)

    def set_dropout(self, p: float) -> None:
        """Change the dropout probability, which our kernels read from the device."""
        self._backend.set_dropout(p)

    def zero_grad(self) -> None:
        """Start a step; see `ManualBackend.zero_grad`."""
        self._zero_grad()

    def forward_backward(self, idx: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Replay a micro-batch; see `ManualBackend.forward_backward`."""
        if idx.shape not in self._micro_batches:
            # No reference to self: a cycle would keep the graph's memory until garbage collection.
            inputs = (idx.clone(), targets.clone())
            forward_backward = partial(self._backend.forward_backward, *inputs, self._scale)
            self._micro_batches[idx.shape] = (*inputs, _CapturedCall(forward_backward))
        static_idx, static_targets, call = self._micro_batches[idx.shape]
        static_idx.copy_(idx)
        static_targets.copy_(targets)
        self._scale.fill_(scale)
        # A copy: the next replay overwrites the loss.
        return call().clone()

    def release_graphs(self) -> None:
        """Free the memory of the micro-batches' graphs."""
        self._micro_batches.clear()


class CudaGraphOptimizerStep:
    """An `optimizer_step`, captured at its second call, and again if the decay of the EMA changes.

    Args:
        step: to capture.
        backend: its gradients are assigned to the parameters once, when the step is captured.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor], Tensor],
        backend: ManualBackend,
        ema: WeightEMA | None,
    ) -> None:
        device = backend.grads.flat.device
        self._lr, self._loss = lr, loss = [torch.zeros((), device=device) for _ in range(2)]

        # No reference to self: a cycle would keep the graph's memory until garbage collection.
        def run() -> Tensor:
            backend.grads.assign_grads()
            return step(lr, loss)

        self._ema, self._ema_decay = ema, 0.0
        self._run = _CapturedCall(run)

    def __call__(self, lr: float, loss: Tensor) -> Tensor:
        """Replay the step; see `optimizer_step`."""
        if self._ema is not None and self._ema.decay != self._ema_decay:
            self._ema_decay = self._ema.decay
            self._run = _CapturedCall(self._run.function)
        self._loss.copy_(loss)
        # For the warmup call too: rounded to fp32, the learning rate differs slightly.
        self._lr.fill_(lr)
        return self._run().clone()


class _CapturedCall(Generic[T]):
    """A function on fixed addresses, captured as a CUDA graph at its second call."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self._is_warmed_up = False
        self._graph: tuple[torch.cuda.CUDAGraph, T] | None = None

    def __call__(self) -> T:
        # The first call autotunes GEMMs and compiles Triton kernels, which a capture cannot hold.
        if not self._is_warmed_up:
            self._is_warmed_up = True
            return self.function()
        if self._graph is None:
            self._graph = _capture(self.function)
        graph, result = self._graph
        graph.replay()
        return result


def _capture(function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Capture a function without running it; returns the graph and its static result."""
    graph = torch.cuda.CUDAGraph()
    with cuda_graph_capture(graph):
        result = function()
    return graph, result
