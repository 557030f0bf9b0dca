"""Signals and clocks that end a run, in evaluations too."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch

from gptforge.builders import build_trainer
from gptforge.checkpoint.store import read_tensors
from gptforge.evaluate.val_loss import PartialValLoss
from gptforge.train.signals import StopSignal
from gptforge.train.state import TrainState
from tests.train.runs import build, events, last


def test_a_signal_in_an_evaluation_ends_it_and_saves_what_was_learned(config, tmp_path) -> None:
    assert build(config).fit() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "told"))
    trainer = build(other)
    assert trainer.val_evaluator is not None
    score, rounds = trainer.val_evaluator.evaluate_until, []

    def told(gives_up, *args):
        def ask() -> bool:
            rounds.append(1)
            if len(rounds) == 2:
                signal.raise_signal(signal.SIGTERM)
            return gives_up()

        return score(ask, *args)

    trainer.val_evaluator.evaluate_until = told
    assert trainer.fit() == "terminated"
    assert len(rounds) == 2
    assert events(other, "eval") == []
    assert last(other).name == f"step-{config.eval_every:06d}"
    assert build(other).fit() == "finished"
    for file in ("model", "optimizer"):
        left, right = (read_tensors(last(c), f"{file}.safetensors") for c in (config, other))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_signal_in_the_closing_evaluation_leaves_it_to_be_made_up_for(config, tmp_path) -> None:
    config = dataclasses.replace(config, eval_every=1000)
    assert build(config).fit() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "told"))
    trainer = build(other)
    score = trainer.val_evaluator.evaluate_until

    def told(*args):
        signal.raise_signal(signal.SIGTERM)
        return score(*args)

    trainer.val_evaluator.evaluate_until = told
    assert trainer.fit() == "terminated"
    assert last(other).name == f"step-{config.max_steps:06d}"
    assert events(other, "eval") == []
    assert build(other).fit() == "finished"
    for key in ("val_loss", "step"):
        assert [e[key] for e in events(other, "eval")] == [e[key] for e in events(config, "eval")]
    assert build_trainer(other, explicit=(), log=lambda _: None) is None


def stop_in_evaluations(trainer, batches: int) -> None:
    """Have each evaluation of this session stopped after so many batches."""
    evaluate = trainer.held_out.evaluate_until

    def stopped(should_stop, *args):
        asked = []

        def ask() -> bool:
            asked.append(1)
            if len(asked) == batches:
                signal.raise_signal(signal.SIGTERM)
            return should_stop()

        return evaluate(ask, *args)

    trainer.held_out.evaluate_until = stopped


@pytest.mark.parametrize("batches", [1, 2])
def test_stopped_evaluations_are_finished_later_and_nothing_differs(
    config, tmp_path, batches
) -> None:
    config = dataclasses.replace(
        config, max_steps=12, keep=0, save_every=1000, sample_every=4, max_lr=0.1, val_fraction=0.2
    )
    assert build(config).fit() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "stopped"))
    for _ in range(40):
        trainer = build(other)
        stop_in_evaluations(trainer, batches)
        if trainer.fit() == "finished":
            break
    else:
        pytest.fail("40 sessions were not enough")
    for kind in ("train", "eval"):
        fields = ("step", "loss", "norm", "val_loss", "val_bpb")
        left, right = (
            [[e.get(name) for name in fields] for e in events(c, kind)] for c in (config, other)
        )
        assert left == right
    samples = [
        (Path(c.out_dir) / "samples.md").read_text().split("\n", 1)[1] for c in (config, other)
    ]
    assert samples[0] == samples[1]
    left, right = (last(c).parent for c in (config, other))
    assert sorted(p.name for p in left.iterdir()) == sorted(p.name for p in right.iterdir())
    assert (left / "best").readlink() == (right / "best").readlink()
    assert build_trainer(other, explicit=(), log=lambda _: None) is None


def test_a_closing_evaluation_of_a_run_saved_by_0_1_is_made_up_for() -> None:
    numbers = {"step": 9, "loss": 1.0, "best_loss": None, "best_step": 0, "loss_sum": 6.0}
    numbers |= {"loss_count": 3.0, "returns": 2, "unjudged": 1, "seconds": 5.0}
    progress = TrainState.from_json({"progress": numbers})
    assert progress.pending == ["evaluate", "sample", "save"]
    assert progress.recent_losses == [2.0, 2.0, 2.0]
    assert (progress.rollbacks, progress.best_loss) == (2, math.inf)


def test_progress_reads_what_it_wrote() -> None:
    progress = TrainState(
        step=7,
        loss=math.nan,
        recent_losses=[1.5, math.inf],
        rollbacks=1,
        diverged_at=5,
        bad_steps=2,
        pending=["evaluate", "save"],
        partial=PartialValLoss(
            sequences_done=3, num_sequences=9, total_nats=1.25, num_tokens=48, num_bytes=50
        ),
    )
    back = TrainState.from_json(json.loads(json.dumps(progress.to_json())))
    assert math.isnan(back.loss) and math.isnan(back.recent_losses[1])
    same = {"loss": 0.0, "recent_losses": []}
    assert dataclasses.replace(back, **same) == dataclasses.replace(progress, **same)


def test_time_counts_from_the_start_but_leaves_a_second() -> None:
    now = [100.0]
    guard = StopSignal(1, log=lambda _: None, started=30.0, clock=lambda: now[0])
    assert guard.stop_reason() == "time_limit"
    with guard:
        assert guard.stop_reason() is None
        now[0] += 1
        assert guard.stop_reason() == "time_limit"


def test_time_that_is_over_ends_an_evaluation(config) -> None:
    now = [0.0]
    trainer = build(config)
    trainer.stop_signal = StopSignal(1, log=lambda _: None, clock=lambda: now[0])
    score = trainer.val_evaluator.evaluate_until

    def late(*args):
        now[0] = 61.0
        return score(*args)

    trainer.val_evaluator.evaluate_until = late
    assert trainer.fit() == "time_limit"
    assert events(config, "eval") == []
    assert last(config).name == f"step-{config.eval_every:06d}"


def test_time_runs_out_only_on_its_own_clock() -> None:
    now = [100.0]
    guard = StopSignal(2, log=lambda _: None, clock=lambda: now[0])
    assert guard.stop_reason() is None
    now[0] += 119
    assert guard.stop_reason() is None
    now[0] += 1
    assert guard.stop_reason() == "time_limit"
    assert StopSignal(0, log=lambda _: None, clock=lambda: 1e18).stop_reason() is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (getattr(signal, "SIGHUP", signal.SIGTERM), "terminated"),
    ],
)
def test_a_signal_becomes_a_wish_and_the_old_handler_comes_back(number, reason) -> None:
    before = signal.getsignal(number)
    said: list[str] = []
    with StopSignal(0, log=said.append) as guard:
        signal.raise_signal(number)
        assert guard.stop_reason() == reason
    assert signal.getsignal(number) is before
    assert len(said) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(0, log=lambda _: None) as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.stop_reason() is None
    finally:
        signal.signal(signal.SIGHUP, before)
