"""Runs in fp8 have their warmup steps in bfloat16; on a CPU, with torch's operations for both."""

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptforge import device
from gptforge.builders import build_train_step
from gptforge.builders.step_timing import build_bench_step
from gptforge.checkpoint.format import read_tensors
from gptforge.config import Config
from gptforge.kernel_select import KernelConfig
from gptforge.training import train_step
from gptforge.training.backends import cuda_graph
from gptforge.training.backends.manual import ManualBackend
from gptforge.training.trainer import Trainer
from tests.training.backends.test_cuda_graph import fake_capture
from tests.training.runs import StopAfter, build, events, last

WARMUP = 4
BF16_LINE = f"matmuls run in bfloat16 until step {WARMUP}."
FP8_LINE = f"Step {WARMUP}: matmuls run in fp8 from here on."


@pytest.fixture
def config(config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of 10 steps in fp8 as on a GPU, on the CPU and without CUDA graphs."""
    monkeypatch.setattr(device, "has_float8", lambda _: True)
    monkeypatch.setattr(
        build_train_step,
        "select_kernels",
        lambda _c, _d, precision: KernelConfig(manual_backward=True, float8=precision.float8),
    )
    monkeypatch.setattr(build_train_step, "CUDA_GRAPH_MAX_FLOPS", 0)
    monkeypatch.setattr(cuda_graph, "_capture", fake_capture)
    return dataclasses.replace(config, dtype="fp8", warmup_steps=WARMUP, max_steps=10)


@pytest.fixture
def use_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Runs that are built from now on have stand-ins of CUDA graphs."""
    return lambda: monkeypatch.setattr(build_train_step, "CUDA_GRAPH_MAX_FLOPS", math.inf)


def record_kernels(trainer: Trainer) -> list[tuple[int, bool]]:
    """The list that gets each step of a trainer, and whether it was in fp8."""
    steps: list[tuple[int, bool]] = []
    update = trainer.step_fn

    class Recorded(type(update)):
        def __call__(self, *args, **kwargs):
            steps.append((trainer.state.step, self.kernels.float8))
            assert ("fp8" in self.backend_name) == self.kernels.float8
            return super().__call__(*args, **kwargs)

    update.__class__ = Recorded
    return steps


def expected_kernels(*steps: int) -> list[tuple[int, bool]]:
    return [(step, step >= WARMUP) for step in steps]


def lines(config: Config) -> list[str]:
    text = (Path(config.out_dir) / "log.md").read_text("utf-8")
    return [line for line in text.splitlines() if "matmuls run" in line]


def losses(config: Config) -> list[float]:
    return [event["loss"] for event in events(config, "train")]


def assert_same_run(first: Config, second: Config) -> None:
    assert losses(first) == losses(second)
    for name in ("model", "optimizer", "rng"):
        one, two = (read_tensors(last(c), f"{name}.safetensors") for c in (first, second))
        assert [key for key in one if not torch.equal(one[key], two[key])] == []


def has_graph(trainer: Trainer) -> bool:
    return isinstance(trainer.step_fn.backend, cuda_graph.CudaGraphBackend)


def other_run(config: Config, name: str, **changes: object) -> Config:
    folder = Path(config.out_dir).with_name(name)
    return dataclasses.replace(config, out_dir=str(folder), **changes)


def test_fp8_begins_after_the_warmup(config) -> None:
    trainer = build(config)
    steps = record_kernels(trainer)
    assert trainer.fit() == "finished"
    assert steps == expected_kernels(*range(10))
    assert lines(config) == [f"Step 0: {BF16_LINE}", FP8_LINE]
    bf16 = other_run(config, "bf16", dtype="bfloat16")
    build(bf16).fit()
    # The loss of a step is computed before its update.
    equal = [a == b for a, b in zip(losses(config), losses(bf16), strict=True)]
    assert all(equal[:WARMUP]) and not any(equal[WARMUP:])
    assert lines(bf16) == []


def test_without_a_warmup_all_steps_are_in_fp8(config) -> None:
    config = dataclasses.replace(config, warmup_steps=0, max_steps=3)
    trainer = build(config)
    steps = record_kernels(trainer)
    trainer.fit()
    assert steps == [(step, True) for step in range(3)]
    assert lines(config) == []


@pytest.mark.parametrize("stop", [WARMUP - 2, WARMUP, WARMUP + 2])
@pytest.mark.parametrize("graph", [False, True])
def test_resumed_run_is_bitwise_equal(config, stop, graph, use_graphs) -> None:
    options = {"ema": 0.9} if graph else {"dropout_ramp": 0.5}
    config = dataclasses.replace(config, **options)
    if graph:
        use_graphs()
    straight = other_run(config, "straight")
    build(straight).fit()
    first = build(config)
    first.stop_signal = StopAfter(stop)
    assert first.fit() == "interrupted"
    torch.manual_seed(99)
    resumed = build(config)
    assert has_graph(resumed) == graph
    steps = record_kernels(resumed)
    resumed.fit()
    assert steps == expected_kernels(*range(stop, 10))
    assert_same_run(straight, config)


def test_teachers_have_a_warmup_too(config) -> None:
    config = dataclasses.replace(config, teachers=1, max_steps=6)
    assert build(config).fit() == "finished"
    teacher = dataclasses.replace(config, out_dir=f"{config.out_dir}/teachers/teacher-1")
    for run in (teacher, config):
        assert lines(run) == [f"Step 0: {BF16_LINE}", FP8_LINE]


def test_bench_times_steps_in_fp8(config) -> None:
    step = build_bench_step(dataclasses.replace(config, vocab_size=64), ())
    assert step.backend_name == "manual backward, fp8"


def test_extended_run_stays_in_fp8(config) -> None:
    build(dataclasses.replace(config, max_steps=6)).fit()
    trainer = build(dataclasses.replace(config, max_steps=8))
    steps = record_kernels(trainer)
    trainer.fit()
    assert steps == [(6, True), (7, True)]


def test_rollback_into_the_warmup_goes_back_to_bf16(config, monkeypatch) -> None:
    config = dataclasses.replace(config, save_every=3, eval_every=50)
    trainer = build(config)
    forward_backward = ManualBackend.forward_backward

    def poisoned(self, x, y, scale):
        # The dataloader is already behind the current batch.
        batch = trainer.dataloader.position // config.global_batch_size - 1
        factor = math.nan if batch in range(3, 8) else 1.0
        return forward_backward(self, x, y, scale * factor) * factor

    monkeypatch.setattr(ManualBackend, "forward_backward", poisoned)
    steps = record_kernels(trainer)
    assert trainer.fit() == "finished"
    [rollback] = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    assert rollback["checkpoint"] == "step-000003"
    assert steps == expected_kernels(*range(8), *range(3, 10))
    assert lines(config) == [f"Step 0: {BF16_LINE}", f"Step 3: {BF16_LINE}", FP8_LINE]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_cuda_graphs_are_captured_again(config, ema, use_graphs) -> None:
    # A graph rounds the learning rate to float32: here it is exact. The EMA differs from step 9 on.
    config = dataclasses.replace(
        config, ema=ema, max_lr=10 * 2**-11, schedule="constant", warmup_steps=10, max_steps=13
    )
    build(config).fit()
    use_graphs()
    trainer = build(other_run(config, "graph"))
    steps = record_kernels(trainer)
    trainer.fit()
    assert has_graph(trainer)
    assert steps == [(step, step >= 10) for step in range(13)]
    assert_same_run(trainer.config, config)


def test_without_memory_for_cuda_graphs_training_continues(config, monkeypatch, use_graphs) -> None:
    use_graphs()
    trainer = build(dataclasses.replace(config, max_steps=WARMUP + 2))
    assert has_graph(trainer)
    monkeypatch.setattr(train_step, "fits_memory", lambda *_: False)
    assert trainer.fit() == "finished"
    assert trainer.step_fn.backend_name == "manual backward, fp8"


def test_old_buffers_are_freed_before_new_ones_are_allocated(config, monkeypatch) -> None:
    """There may be no memory for both, so a reference cycle would be a bug."""
    trainer = build(dataclasses.replace(config, max_steps=WARMUP + 1))
    step_fn = trainer.step_fn
    build_backend, buffers, is_freed = step_fn._build_backend, [], []

    def watched(kernels):
        is_freed.append(buffers[-1]() is None)
        is_freed.append(all(p.grad is None for p in step_fn.model.parameters()))
        backend, reducer = build_backend(kernels)
        buffers.append(weakref.ref(backend.grads.flat))
        return backend, reducer

    buffers.append(weakref.ref(step_fn.backend.grads.flat))
    monkeypatch.setattr(step_fn, "_build_backend", watched)
    gc.collect()
    gc.disable()
    try:
        trainer.fit()
    finally:
        gc.enable()
    assert is_freed == [True] * 4


def test_micro_batches_are_halved_in_both(config, monkeypatch) -> None:
    """Out of memory in the first step of each."""
    config = dataclasses.replace(config, max_steps=WARMUP + 2)
    trainer = build(config)
    update, failures = trainer.step_fn, []
    forward_backward = ManualBackend.forward_backward

    def limited(self, x, y, scale):
        if len(x) > (1 if update.kernels.float8 else 2):
            failures.append((trainer.state.step, len(x)))
            raise torch.OutOfMemoryError
        return forward_backward(self, x, y, scale)

    monkeypatch.setattr(ManualBackend, "forward_backward", limited)
    assert trainer.fit() == "finished"
    assert failures == [(0, 4), (WARMUP, 2)] and update.micro_batch_size == 1
