"""Whole runs of a tiny model, in this process."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.builders import build_trainer
from gptforge.checkpoint.store import CheckpointStore, read_state, read_tensors
from tests.train.runs import StopAfter, build, events, last


def test_a_run_makes_exactly_max_steps_updates(config) -> None:
    trainer = build(config)
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.dataloader.position == 20 * config.global_batch_size
    steps = {float(s["step"]) for s in trainer.step_fn.optimizer.state.values()}
    assert steps == {20.0}
    assert last(config).name == "step-000020"
    assert events(config, "end")[0]["reason"] == "finished"


def test_what_is_said_to_be_compiled_stays_compiled(config, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    said: list[str] = []
    config = dataclasses.replace(config, compile="true", dropout=0.0)
    trainer = build_trainer(config, explicit=(), log=said.append)
    assert trainer is not None
    assert "torch.compile: on, as requested" in said
    assert trainer.step_fn.is_compiled


@pytest.mark.parametrize(
    ("val_fraction", "dtype", "optimizer"),
    [
        (0.1, "float32", "adamw"),
        (0.0, "float32", "adamw"),
        (0.1, "bfloat16", "adamw"),
        (0.1, "float32", "muon"),
    ],
)
def test_a_run_cut_in_two_is_the_run_in_one_bit_for_bit(
    config, tmp_path, val_fraction, dtype, optimizer
) -> None:
    config = dataclasses.replace(
        config, val_fraction=val_fraction, dtype=dtype, optimizer=optimizer
    )
    straight = dataclasses.replace(config, out_dir=str(tmp_path / "straight"))
    build(straight).fit()

    first = build(config)
    first.stop_signal = StopAfter(8)
    assert first.fit() == "interrupted"
    assert last(config).name == "step-000008"
    torch.manual_seed(99)  # a new process has other dice
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


def test_losses_of_a_resumed_log_have_no_gap_and_no_double(config) -> None:
    first = build(config)
    first.stop_signal = StopAfter(9)
    first.fit()
    # As if the process had died two steps behind the checkpoint, with its lines written.
    with (Path(config.out_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 9, "loss": 1}\n{"event": "train", "st')
    build(config).fit()
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    log = (Path(config.out_dir) / "log.md").read_text()
    assert log.count("\nstep 9 |") == 1


def test_another_micro_batch_goes_on_with_the_same_data(config) -> None:
    first = build(config)
    first.stop_signal = StopAfter(8)
    first.fit()
    other = dataclasses.replace(config, batch_size=2, gradient_accumulation_steps=4)
    trainer = build(other)
    assert trainer.dataloader.position == 8 * config.global_batch_size
    assert trainer.fit() == "finished"


def test_best_is_the_lowest_held_out_loss_and_never_gets_worse(config) -> None:
    trainer = build(dataclasses.replace(config, max_steps=40, max_lr=0.05))
    trainer.fit()
    losses = {event["step"]: event["val_loss"] for event in events(config, "eval")}
    assert set(losses) == set(range(4, 41, 4))
    best = min(losses, key=lambda step: losses[step])
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    assert store.read_link("best").name == f"step-{best:06d}"
    assert trainer.state.best_loss == losses[best]
    so_far = math.inf
    for event in [e for e in events(config, "save") if e["best"]]:
        assert losses[event["step"]] < so_far
        so_far = losses[event["step"]]


def test_with_nothing_held_out_best_goes_by_the_mean_training_loss(config) -> None:
    config = dataclasses.replace(config, val_fraction=0.0)
    trainer = build(config)
    trainer.fit()
    assert events(config, "eval") == []
    losses = [event["loss"] for event in events(config, "train")]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, 20, 4)]
    assert trainer.state.best_loss == pytest.approx(min(means), rel=1e-5)
    assert trainer.state.best_step == 4 * (means.index(min(means)) + 1)


def test_training_losses_are_averaged_over_as_many_steps_at_the_end(config) -> None:
    config = dataclasses.replace(config, val_fraction=0.0, max_steps=18, eval_every=8)
    trainer = build(config)
    means = {}
    evaluate = trainer._recent_loss
    trainer._recent_loss = lambda: means.setdefault(trainer.state.step, evaluate())
    trainer.fit()
    losses = [event["loss"] for event in events(config, "train")]
    wanted = {step: sum(losses[step - 8 : step]) / 8 for step in (8, 16, 18)}
    assert means == pytest.approx(wanted, rel=1e-5)


def test_the_last_step_is_logged_whatever_the_cadence(config) -> None:
    config = dataclasses.replace(config, log_every=7, eval_every=100)
    build(config).fit()
    assert [event["step"] for event in events(config, "train")] == [0, 7, 14, 19]
    assert [event["step"] for event in events(config, "eval")] == [20]


def test_a_run_with_the_largest_seed_comes_to_its_end(config) -> None:
    config = dataclasses.replace(config, seed=2**63 - 1, sample_every=2, stagger=True)
    assert build(config).fit() == "finished"
    assert (Path(config.out_dir) / "samples.md").read_text().count("## After") == 10
