"""Updates that are played back: on a GPU from recordings, on a CPU by doing the work again."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from gptforge.device import Precision
from gptforge.kernel_select import KernelConfig
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.train.backends import cuda_graph
from gptforge.train.train_step import TrainStep

Pair = tuple[TrainStep, TrainStep]
MakePair = Callable[..., Pair]


class DoneAgain:
    """What a recording looks like from outside: its result is always in the same place."""

    def __init__(self, work: Callable[[], Tensor | None]) -> None:
        self._work = work
        self.result = work()
        self._is_done = True

    def replay(self) -> None:
        # Recording does no work yet, but here it had to, to have a result.
        if self._is_done:
            self._is_done = False
            return
        result = self._work()
        if self.result is not None and result is not None:
            self.result.copy_(result)


def pretend_to_record(work: Callable[[], Tensor | None]) -> tuple[DoneAgain, Tensor | None]:
    recording = DoneAgain(work)
    return recording, recording.result


@pytest.fixture
def pair(tiny_model: GPT, device: torch.device, monkeypatch) -> MakePair:
    """Two of one kind: one that is played back, and one that is not."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr(cuda_graph, "_capture", pretend_to_record)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def make(optimizer: str = "adamw", clip: float = 1.0) -> Pair:
        recorded, plain = (
            TrainStep(
                model,
                build_optimizer(optimizer, model, betas=(0.9, 0.95), weight_decay=0.1),
                precision=Precision(dtype, "test"),
                micro_batch_size=4,
                grad_clip=clip,
                kernels=KernelConfig(manual_backward=True),
            )
            for model in (copy.deepcopy(tiny_model).to(device) for _ in range(2))
        )
        assert recorded.capture_cuda_graph(16)
        assert recorded.backend_name == "written out, recorded"
        return recorded, plain

    return make


def batch(step: TrainStep) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (8, 17), generator=dice).to(step.device)
    return tokens[:, :-1], tokens[:, 1:]


def assert_alike(recorded: TrainStep, plain: TrainStep) -> None:
    for p, q in zip(recorded.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def tensors(step: TrainStep) -> list[Tensor]:
    """All that an update moves."""
    moments = [slot for state in step.optimizer.state.values() for slot in state.values()]
    return [p.detach() for p in step.model.parameters()] + moments


def test_recording_moves_nothing(pair: MakePair) -> None:
    recorded, plain = pair()
    assert all(
        torch.equal(p, q)
        for p, q in zip(recorded.model.parameters(), plain.model.parameters(), strict=True)
    )
    assert not any(slot.any() for slot in tensors(recorded)[len([*plain.model.parameters()]) :])


def test_it_follows_the_learning_rate_and_clips(pair: MakePair) -> None:
    # Shortened by other factors each time: one that never changed AdamW would not notice.
    recorded, plain = pair(clip=0.1)
    for step in range(6):
        rate = 1e-2 / (step + 1)
        norms = [update(*batch(update), lr=rate)[1] for update in (recorded, plain)]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-4)
        assert norms[0] > 0.2
    assert_alike(recorded, plain)
    assert {float(state["step"]) for state in recorded.optimizer.state.values()} == {6.0}


def test_an_update_that_is_not_finite_is_left_out(pair: MakePair) -> None:
    recorded, _ = pair()
    for _ in range(3):
        recorded(*batch(recorded), lr=1e-2)
    [bias] = [p for name, p in recorded.model.named_parameters() if name.endswith("ln_f.bias")]
    with torch.no_grad():
        before = bias.clone()
        bias.fill_(torch.nan)
    kept = [tensor.clone() for tensor in tensors(recorded)]
    loss, _ = recorded(*batch(recorded), lr=1e-2)
    assert not loss.isfinite()
    for tensor, was in zip(tensors(recorded), kept, strict=True):
        torch.testing.assert_close(tensor, was, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        bias.copy_(before)
    loss, _ = recorded(*batch(recorded), lr=1e-2)
    assert loss.isfinite()
    assert not torch.equal(bias, before)
    assert {float(state["step"]) for state in recorded.optimizer.state.values()} == {4.0}


def test_muon_moves_by_gradients_that_are_played_back(pair: MakePair) -> None:
    recorded, plain = pair(optimizer="muon")
    for _ in range(4):
        losses = [update(*batch(update), lr=1e-2)[0] for update in (recorded, plain)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert losses[0] < 4


def test_after_going_back_it_goes_on_from_there(pair: MakePair) -> None:
    recorded, _ = pair()
    for _ in range(3):
        recorded(*batch(recorded), lr=1e-2)
    saved = [tensor.clone() for tensor in tensors(recorded)]
    first = [float(recorded(*batch(recorded), lr=1e-2)[0]) for _ in range(3)]
    for tensor, value in zip(tensors(recorded), saved, strict=True):
        tensor.copy_(value)
    assert [float(recorded(*batch(recorded), lr=1e-2)[0]) for _ in range(3)] == first
    assert first[0] > first[2]


def test_it_goes_on_with_smaller_micro_batches(pair: MakePair) -> None:
    recorded, plain = pair()
    for turn in range(5):
        if turn == 2:
            recorded._halve_micro_batch()
            assert recorded.micro_batch_size == 2
        losses = [update(*batch(update), lr=1e-2)[0] for update in (recorded, plain)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert_alike(recorded, plain)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_was_recorded_goes_at_once_with_the_way_or_the_update(
    pair: MakePair, device, monkeypatch, no_collector, optimizer
) -> None:
    """There may be no room for two of them: none may wait for the collector of garbage."""
    if device.type == "cpu":
        # A recording knows no more what it was made of.
        monkeypatch.setattr(cuda_graph, "_capture", lambda work: (Mock(), work()))
    recorded, plain = pair(optimizer=optimizer)
    way = weakref.ref(recorded.backend._backend)
    recorded.set_kernels(recorded.kernels)
    assert way() is None
    assert recorded.capture_cuda_graph(16)
    whole = weakref.ref(recorded.model)
    del recorded
    assert whole() is None
    assert plain.model is not None
