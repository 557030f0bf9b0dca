"""Steps with CUDA graphs; on a CPU, a stand-in that runs the function again."""

import gc
import weakref
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.training.backends import cuda_graph
from gptforge.training.train_step import TrainStep
from tests.training.steps import BFLOAT16, FLOAT32, make_batch, make_step

MakePair = Callable[..., tuple[TrainStep, TrainStep]]


class FakeGraph:
    """A graph as others see it: its result is always at the same address."""

    def __init__(self, function: Callable[[], Tensor | None]) -> None:
        self._function = function
        # Capturing does not run the function, but here it has to, to have a result.
        self.result = function()
        self._is_first_replay = True

    def replay(self) -> None:
        if self._is_first_replay:
            self._is_first_replay = False
            return
        result = self._function()
        if self.result is not None and result is not None:
            self.result.copy_(result)


def fake_capture(function: Callable[[], Tensor | None]) -> tuple[FakeGraph, Tensor | None]:
    graph = FakeGraph(function)
    return graph, graph.result


@pytest.fixture
def pair(tiny_model: GPT, device: torch.device, monkeypatch) -> MakePair:
    """Two equal steps, the first with CUDA graphs."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(cuda_graph, "_capture", fake_capture)
    model = tiny_model.to(device)

    def make(**options) -> tuple[TrainStep, TrainStep]:
        options |= {
            "precision": BFLOAT16 if device.type == "cuda" else FLOAT32,
            "batch_size": 4,
            "kernels": KernelConfig(manual_backward=True),
        }
        graph, plain = make_step(model, **options), make_step(model, **options)
        assert graph.capture_cuda_graph(16)
        assert graph.backend_name == "manual backward, CUDA graph"
        return graph, plain

    return make


def train(step: TrainStep, lr: float = 1e-2) -> tuple[Tensor, Tensor]:
    return step(*make_batch(step.device), lr=lr)


def assert_same_weights(graph: TrainStep, plain: TrainStep) -> None:
    for p, q in zip(graph.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def steps_made(step: TrainStep) -> set[float]:
    return {float(state["step"]) for state in step.optimizer.state.values()}


def tensors(step: TrainStep) -> list[Tensor]:
    """All that a step changes: weights, then optimizer state."""
    state = [tensor for state in step.optimizer.state.values() for tensor in state.values()]
    return [p.detach() for p in step.model.parameters()] + state


def test_capturing_changes_nothing(pair: MakePair) -> None:
    graph, plain = pair()
    weights = list(plain.model.parameters())
    for p, q in zip(graph.model.parameters(), weights, strict=True):
        assert torch.equal(p, q)
    assert not any(tensor.any() for tensor in tensors(graph)[len(weights) :])


def test_learning_rate_and_clipping_take_effect(pair: MakePair) -> None:
    # Clipped by another factor at each step: AdamW would not notice one that stays the same.
    graph, plain = pair(grad_clip=0.1)
    for i in range(6):
        norms = [train(step, lr=1e-2 / (i + 1))[1] for step in (graph, plain)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-4)
        assert norms[0] > 0.2
    assert_same_weights(graph, plain)
    assert steps_made(graph) == {6.0}


def test_step_that_is_not_finite_is_skipped(pair: MakePair) -> None:
    graph, _ = pair()
    for _ in range(3):
        train(graph)
    [bias] = [p for name, p in graph.model.named_parameters() if name.endswith("ln_f.bias")]
    with torch.no_grad():
        old_bias = bias.clone()
        bias.fill_(torch.nan)
    before = [tensor.clone() for tensor in tensors(graph)]
    assert not train(graph)[0].isfinite()
    for tensor, expected in zip(tensors(graph), before, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        bias.copy_(old_bias)
    assert train(graph)[0].isfinite()
    assert not torch.equal(bias, old_bias)
    assert steps_made(graph) == {4.0}


def test_muon_gets_the_gradients(pair: MakePair) -> None:
    graph, plain = pair(optimizer="muon")
    for _ in range(4):
        losses = [train(step)[0] for step in (graph, plain)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert losses[0] < 4


def test_average_of_the_weights_is_captured(pair: MakePair) -> None:
    # By then the decay has changed twice.
    graph, plain = pair(ema=0.6)
    for _ in range(41):
        for step in (graph, plain):
            train(step, lr=1e-3)
    assert graph.ema is not None and plain.ema is not None
    assert graph.ema.decay == 0.6
    for name, average in graph.ema.tensors.items():
        torch.testing.assert_close(average, plain.ema.tensors[name], rtol=1e-3, atol=1e-4)
        assert not torch.equal(average, graph.model.get_parameter(name))


def test_restored_weights_take_effect(pair: MakePair) -> None:
    graph, _ = pair()
    for _ in range(3):
        train(graph)
    saved = [tensor.clone() for tensor in tensors(graph)]
    first = [float(train(graph)[0]) for _ in range(3)]
    for tensor, value in zip(tensors(graph), saved, strict=True):
        tensor.copy_(value)
    assert [float(train(graph)[0]) for _ in range(3)] == first
    assert first[0] > first[2]


def test_smaller_micro_batches_after_out_of_memory(pair: MakePair) -> None:
    graph, plain = pair()
    for i in range(5):
        if i == 2:
            graph._halve_micro_batch()
            assert graph.micro_batch_size == 2
        losses = [train(step)[0] for step in (graph, plain)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert_same_weights(graph, plain)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_graphs_are_freed_at_once_with_the_backend_or_the_step(
    pair: MakePair, device, monkeypatch, no_garbage_collection, optimizer
) -> None:
    """There may be no memory for two of them, so a reference cycle would be a bug."""
    if device.type == "cpu":
        # A real graph does not reference the function.
        monkeypatch.setattr(cuda_graph, "_capture", lambda function: (Mock(), function()))
    graph, _ = pair(optimizer=optimizer)
    manual = weakref.ref(graph.backend._backend)
    graph.set_kernels(graph.kernels)
    assert manual() is None
    assert graph.capture_cuda_graph(16)
    model = weakref.ref(graph.model)
    del graph
    assert model() is None
