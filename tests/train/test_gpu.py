"""Whole runs on a GPU: what only its streams, its kernels and its memory can get wrong."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.builders import build_trainer
from gptforge.checkpoint.store import read_tensors
from gptforge.config import Config
from tests.train.runs import StopAfter, build, events, last

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.fixture
def config(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return dataclasses.replace(config, device="cuda", compile="false", dtype="bfloat16")


@pytest.fixture
def repeatable(config: Config):
    """Deterministic kernels, for one test only: the switch is global."""
    yield dataclasses.replace(config, deterministic=True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_deterministic_run_cut_in_two_is_the_run_in_one_bit_for_bit(
    repeatable, tmp_path, dtype
) -> None:
    config = dataclasses.replace(repeatable, dtype=dtype)
    straight = dataclasses.replace(config, out_dir=str(tmp_path / "straight"))
    build(straight).fit()
    first = build(config)
    first.stop_signal = StopAfter(8)
    first.fit()
    torch.cuda.manual_seed(99)
    build(config).fit()
    for name in ("model", "optimizer", "rng"):
        one = read_tensors(last(straight), f"{name}.safetensors")
        two = read_tensors(last(config), f"{name}.safetensors")
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    losses = [[event["loss"] for event in events(c, "train")] for c in (straight, config)]
    assert losses[0] == losses[1]


def test_a_checkpoint_holds_the_weights_of_its_own_step(config) -> None:
    """Copies travel beside the training that changes the originals."""
    config = dataclasses.replace(config, save_every=1, keep=99, eval_every=99)
    trainer = build(config)
    weights = {}
    submit = trainer.saver.save_async

    def noting(step, snapshot, *, is_best) -> None:
        weights[step] = trainer.step_fn.model.transformer["wte"].weight.detach().cpu().clone()
        submit(step, snapshot, is_best=is_best)

    trainer.saver.save_async = noting
    trainer.fit()
    for step, expected in weights.items():
        path = Path(config.out_dir) / "checkpoints" / f"step-{step:06d}"
        saved = read_tensors(path, "model.safetensors")["transformer.wte.weight"]
        assert torch.equal(saved, expected), step
    assert set(weights) == set(range(1, 21))


def test_a_batch_whose_gradient_is_not_finite_changes_nothing_and_is_reported(config) -> None:
    trainer = build(config)
    step = trainer.step_fn
    plain, weights = step._forward_backward, []

    def poisoned(x, y, scale):
        if trainer.state.step in (6, 7):
            weights.append(step.model.transformer["wte"].weight.detach().clone())
            return plain(x, y, scale * math.nan) * math.nan
        return plain(x, y, scale)

    step._forward_backward = poisoned
    assert trainer.fit() == "finished"
    assert len(weights) == 4
    assert all(torch.equal(weights[0], other) for other in weights)
    found = [event["step"] for event in events(config, "anomaly")]
    assert found == [6, 7]


def test_memory_that_runs_out_at_the_start_makes_smaller_micro_batches(config) -> None:
    """A GPU that has 6 MB left for activations learns the same batch in more parts."""
    config = dataclasses.replace(
        config, n_embd=256, n_head=4, batch_size=512, gradient_accumulation_steps=1, max_steps=2,
        warmup_steps=1,
    )  # fmt: skip
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + 220 * 2**20) / total)
    try:
        trainer = build_trainer(
            config, explicit=("gradient_accumulation_steps",), log=lambda _: None
        )
        assert trainer is not None
        assert 1 < trainer.step_fn.micro_batch_size < 512
        assert trainer.fit() == "finished"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert trainer.dataloader.position == 2 * 512
