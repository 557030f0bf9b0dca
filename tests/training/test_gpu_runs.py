"""Runs on a GPU, for what only its streams, kernels and memory can get wrong."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_tensors
from gptforge.config import Config
from gptforge.device import has_float8
from tests.training.runs import StopAfter, build, events, last

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture
def config(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return dataclasses.replace(config, device="cuda", compile="false", dtype="bfloat16")


@pytest.fixture
def deterministic(config: Config):
    """Deterministic kernels for one test: the switch is global."""
    yield dataclasses.replace(config, deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "stop"),
    # In fp8, before the end of the warmup and after it.
    [("bfloat16", 8), ("float16", 8), ("float32", 8), ("fp8", 3), ("fp8", 8)],
)
def test_resumed_deterministic_run_equals_an_uninterrupted_one(
    deterministic, tmp_path, dtype, stop
) -> None:
    if dtype == "fp8" and not has_float8(torch.device("cuda")):
        pytest.skip("this GPU has no fp8")
    config = dataclasses.replace(deterministic, dtype=dtype)
    straight = dataclasses.replace(config, out_dir=str(tmp_path / "straight"))
    build(straight).fit()
    first = build(config)
    first.stop_signal = StopAfter(stop)
    first.fit()
    torch.cuda.manual_seed(99)
    build(config).fit()
    for name in ("model", "optimizer", "rng"):
        one = read_tensors(last(straight), f"{name}.safetensors")
        two = read_tensors(last(config), f"{name}.safetensors")
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    losses = [[event["loss"] for event in events(c, "train")] for c in (straight, config)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_fp8_begins_after_the_warmup_with_cuda_graphs(config, tmp_path, ema) -> None:
    if not has_float8(torch.device("cuda")):
        pytest.skip("this GPU has no fp8")
    runs = {}
    for dtype in ("bfloat16", "fp8"):
        changes = {"dtype": dtype, "ema": ema, "warmup_steps": 10, "dropout": 0.0}
        c = dataclasses.replace(config, **changes, out_dir=str(tmp_path / dtype))
        trainer = build(c)
        names = [trainer.step_fn.backend_name]
        trainer.fit()
        names.append(trainer.step_fn.backend_name)
        suffix = ", fp8" if dtype == "fp8" else ""
        assert names == [f"manual backward{suffix}, CUDA graph"] * 2
        runs[dtype] = [event["loss"] for event in events(c, "train")]
    # Sums by atomics, and GEMMs that are tuned again, differ in the last bits.
    torch.testing.assert_close(runs["fp8"][:10], runs["bfloat16"][:10], rtol=1e-3, atol=0)
    torch.testing.assert_close(runs["fp8"], runs["bfloat16"], rtol=2e-2, atol=0)
    assert runs["fp8"][10:] != runs["bfloat16"][10:]


def test_checkpoint_has_the_weights_of_its_step(config) -> None:
    """They are copied to the host while training changes the originals."""
    config = dataclasses.replace(config, save_every=1, keep_checkpoints=99, eval_every=99)
    trainer = build(config)
    weights = {}
    save_async = trainer.saver.save_async

    def recorded(step, snapshot, *, is_best) -> None:
        weights[step] = trainer.step_fn.model.transformer["wte"].weight.detach().cpu().clone()
        save_async(step, snapshot, is_best=is_best)

    trainer.saver.save_async = recorded
    trainer.fit()
    for step, expected in weights.items():
        path = Path(config.out_dir) / "checkpoints" / f"step-{step:06d}"
        saved = read_tensors(path, "model.safetensors")["transformer.wte.weight"]
        assert torch.equal(saved, expected), step
    assert set(weights) == set(range(1, 21))


def test_step_with_nan_changes_nothing_and_is_reported(config) -> None:
    trainer = build(config)
    step = trainer.step_fn
    forward_backward, weights = step.backend.forward_backward, []

    def poisoned(x, y, scale):
        if trainer.state.step in (6, 7):
            weights.append(step.model.transformer["wte"].weight.detach().clone())
            return forward_backward(x, y, scale * math.nan) * math.nan
        return forward_backward(x, y, scale)

    step.backend.forward_backward = poisoned
    assert trainer.fit() == "finished"
    assert len(weights) == 4
    assert all(torch.equal(weights[0], other) for other in weights)
    assert [event["step"] for event in events(config, "anomaly")] == [6, 7]


def test_little_memory_makes_smaller_micro_batches(config) -> None:
    """With 6 MB for activations, the batch is split into more micro-batches."""
    config = dataclasses.replace(
        config, n_embd=256, n_head=4, batch_size=512, gradient_accumulation_steps=1, max_steps=2,
        warmup_steps=1,
    )  # fmt: skip
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 220 * 2**20) / total)
    try:
        trainer = build_trainer(config, explicit=("gradient_accumulation_steps",))
        assert trainer is not None
        assert 1 < trainer.step_fn.micro_batch_size < 512
        assert trainer.fit() == "finished"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert trainer.dataloader.position == 2 * 512
