import dataclasses
import errno
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_state, read_tensors
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config
from gptforge.errors import RunError
from gptforge.training.loss_monitor import LossMonitor
from tests.training.runs import StopAfter, build, events, last


def test_run_makes_max_steps_steps(config) -> None:
    trainer = build(config)
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.dataloader.position == 20 * config.global_batch_size
    steps = {float(s["step"]) for s in trainer.step_fn.optimizer.state.values()}
    assert steps == {20.0}
    assert last(config).name == "step-000020"
    assert events(config, "end")[0]["reason"] == "finished"


def test_average_of_the_weights_is_evaluated_and_saved(config) -> None:
    trainer = build(dataclasses.replace(config, ema=0.9))
    trainer.fit()
    saved = read_tensors(last(config), "model.safetensors")
    raw = read_tensors(last(config), "optimizer.safetensors")
    for name, parameter in trainer.step_fn.model.named_parameters():
        assert torch.equal(raw[f"{name}.raw_weight"], parameter)
        assert trainer.step_fn.ema is not None
        assert torch.equal(saved[name], trainer.step_fn.ema.tensors[name])
        assert not torch.equal(saved[name], parameter)
    assert trainer.val_evaluator is not None
    with trainer.step_fn.ema_weights():
        loss = trainer.val_evaluator.evaluate(trainer.step_fn.model, trainer.step_fn.precision)
    assert events(config, "eval")[-1]["val_loss"] == loss.loss


def test_compile_flag(config, monkeypatch, messages) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    config = dataclasses.replace(config, compile="true", dropout=0.0)
    trainer = build_trainer(config, explicit=())
    assert trainer is not None
    assert "torch.compile: on, as requested" in messages
    assert trainer.step_fn.is_compiled


def test_dropout_ramp_is_not_compiled_and_changes_each_step(config, messages) -> None:
    config = dataclasses.replace(config, compile="true", dropout=0.2, dropout_ramp=0.5)
    trainer = build(config)
    assert any("torch.compile: off" in line and "--dropout_ramp" in line for line in messages)
    found = []
    for _ in range(12):
        trainer.train_step()
        found.append(trainer.step_fn.model.dropout)
    assert found == pytest.approx([0.02 * min(step, 10) for step in range(12)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_fraction": 0.0},
        {"dtype": "bfloat16"},
        {"optimizer": "muon", "muon_lr": 0.01, "muon_weight_decay": 0.5},
        {"ema": 0.9, "token_noise": 0.2},
        {"dropout_ramp": 0.6},
        {"ema": 0.9, "optimizer": "muon"},
    ],
)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path, options) -> None:
    config = dataclasses.replace(config, **options)
    straight = dataclasses.replace(config, out_dir=str(tmp_path / "straight"))
    build(straight).fit()

    first = build(config)
    first.stop_signal = StopAfter(8)
    assert first.fit() == "interrupted"
    assert last(config).name == "step-000008"
    torch.manual_seed(99)  # a new process has another RNG state
    assert build(config).fit() == "finished"

    for name in ("model", "optimizer", "rng"):
        one = read_tensors(last(straight), f"{name}.safetensors")
        two = read_tensors(last(config), f"{name}.safetensors")
        assert one.keys() == two.keys()
        for key in one:
            assert torch.equal(one[key], two[key]), key
    fields = ("step", "loss", "norm", "lr", "epoch")
    for kind in ("train", "eval"):
        left, right = events(straight, kind), events(config, kind)
        names = fields if kind == "train" else ("step", "val_loss", "val_bpb")
        assert [[e[n] for n in names] for e in left] == [[e[n] for n in names] for e in right]
    one, two = read_state(last(straight))["progress"], read_state(last(config))["progress"]
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_crash_after_the_last_save_leaves_no_more_checkpoints(config, tmp_path) -> None:
    config = dataclasses.replace(config, save_every=5, keep_checkpoints=1)
    straight = dataclasses.replace(config, out_dir=str(tmp_path / "straight"))
    build(straight).fit()

    def prune(self: CheckpointStore, *args: object) -> None:
        if self.read_link("last") == self.path_of(20):
            raise OSError(errno.EROFS, "read-only")
        original(self, *args)

    original = CheckpointStore.prune
    trainer = build(config)
    with mock.patch.object(CheckpointStore, "prune", prune), pytest.raises(RunError):
        trainer.fit()
    trainer.close()
    left, kept = [_checkpoints(c) for c in (config, straight)]
    assert len(left) > len(kept)
    assert build(config).fit() == "finished"
    assert _checkpoints(config) == kept


def _checkpoints(config: Config) -> list[str]:
    folder = Path(config.out_dir) / "checkpoints"
    return [path.name for path in CheckpointStore(folder).checkpoints()]


def test_resumed_log_has_every_step_once(config) -> None:
    first = build(config)
    first.stop_signal = StopAfter(9)
    first.fit()
    # As if the process had been killed two steps after the checkpoint, with its lines written.
    with (Path(config.out_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 9, "loss": 1}\n{"event": "train", "st')
    build(config).fit()
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    log = (Path(config.out_dir) / "log.md").read_text()
    assert log.count("\nstep 9 |") == 1


def test_resume_with_another_micro_batch_size(config) -> None:
    first = build(config)
    first.stop_signal = StopAfter(8)
    first.fit()
    other = dataclasses.replace(config, batch_size=2, gradient_accumulation_steps=4)
    trainer = build(other)
    assert trainer.dataloader.position == 8 * config.global_batch_size
    assert trainer.fit() == "finished"


def test_best_checkpoint_has_the_lowest_val_loss(config) -> None:
    trainer = build(dataclasses.replace(config, max_steps=40, max_lr=0.05))
    trainer.fit()
    losses = {event["step"]: event["val_loss"] for event in events(config, "eval")}
    assert set(losses) == set(range(4, 41, 4))
    best = min(losses, key=lambda step: losses[step])
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    assert store.read_link("best").name == f"step-{best:06d}"
    assert trainer.state.best_loss == losses[best]
    lowest = math.inf
    for event in [e for e in events(config, "save") if e["best"]]:
        assert losses[event["step"]] < lowest
        lowest = losses[event["step"]]


def test_without_validation_data_best_is_the_lowest_mean_train_loss(config) -> None:
    config = dataclasses.replace(config, val_fraction=0.0)
    trainer = build(config)
    trainer.fit()
    assert events(config, "eval") == []
    losses = [event["loss"] for event in events(config, "train")]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, 20, 4)]
    assert trainer.state.best_loss == pytest.approx(min(means), rel=1e-5)
    assert trainer.state.best_step == 4 * (means.index(min(means)) + 1)


def test_mean_train_loss_covers_as_many_steps_at_the_end(config, monkeypatch) -> None:
    config = dataclasses.replace(config, val_fraction=0.0, max_steps=18, eval_every=8)
    trainer = build(config)
    means = {}
    mean = LossMonitor.mean_loss
    monkeypatch.setattr(
        LossMonitor, "mean_loss", lambda self: means.setdefault(trainer.state.step, mean(self))
    )
    trainer.fit()
    losses = [event["loss"] for event in events(config, "train")]
    expected = {step: sum(losses[step - 8 : step]) / 8 for step in (8, 16, 18)}
    assert means == pytest.approx(expected, rel=1e-5)


def test_last_step_is_always_logged(config) -> None:
    config = dataclasses.replace(config, log_every=7, eval_every=100)
    build(config).fit()
    assert [event["step"] for event in events(config, "train")] == [0, 7, 14, 19]
    assert [event["step"] for event in events(config, "eval")] == [20]


def test_largest_seed(config) -> None:
    config = dataclasses.replace(config, seed=2**63 - 1, sample_every=2, random_offset=True)
    assert build(config).fit() == "finished"
    assert (Path(config.out_dir) / "samples.md").read_text().count("## After") == 10
