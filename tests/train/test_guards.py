"""Signals and clocks that end a run, in evaluations too."""

import dataclasses
import signal

import pytest
import torch

from gptforge.build import build_trainer
from gptforge.checkpoint.store import read_tensors
from gptforge.train.guards import StopGuard
from tests.train.runs import build, events, last


def test_a_signal_in_an_evaluation_ends_it_and_saves_what_was_learned(config, tmp_path) -> None:
    assert build(config).run() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "told"))
    trainer = build(other)
    assert trainer.held_out is not None
    score, rounds = trainer.held_out.evaluate_unless, []

    def told(gives_up, *args):
        def ask() -> bool:
            rounds.append(1)
            if len(rounds) == 2:
                signal.raise_signal(signal.SIGTERM)
            return gives_up()

        return score(ask, *args)

    trainer.held_out.evaluate_unless = told
    assert trainer.run() == "terminated"
    assert len(rounds) == 2
    assert events(other, "eval") == []
    assert last(other).name == f"step-{config.eval_every:06d}"
    assert build(other).run() == "finished"
    for file in ("model", "optimizer"):
        left, right = (read_tensors(last(c), f"{file}.safetensors") for c in (config, other))
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_signal_in_the_closing_evaluation_leaves_it_to_be_made_up_for(config, tmp_path) -> None:
    config = dataclasses.replace(config, eval_every=1000)
    assert build(config).run() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "told"))
    trainer = build(other)
    score = trainer.held_out.evaluate_unless

    def told(*args):
        signal.raise_signal(signal.SIGTERM)
        return score(*args)

    trainer.held_out.evaluate_unless = told
    assert trainer.run() == "terminated"
    assert last(other).name == f"step-{config.max_steps:06d}"
    assert events(other, "eval") == []
    assert build(other).run() == "finished"
    for key in ("val_loss", "step"):
        assert [e[key] for e in events(other, "eval")] == [e[key] for e in events(config, "eval")]
    assert build_trainer(other, given=(), say=lambda _: None) is None


def test_time_that_is_over_ends_an_evaluation(config) -> None:
    now = [0.0]
    trainer = build(config)
    trainer.guard = StopGuard(1, say=lambda _: None, clock=lambda: now[0])
    score = trainer.held_out.evaluate_unless

    def late(*args):
        now[0] = 61.0
        return score(*args)

    trainer.held_out.evaluate_unless = late
    assert trainer.run() == "time_limit"
    assert events(config, "eval") == []
    assert last(config).name == f"step-{config.eval_every:06d}"


def test_time_runs_out_only_on_its_own_clock() -> None:
    now = [100.0]
    guard = StopGuard(2, say=lambda _: None, clock=lambda: now[0])
    assert guard.wish() is None
    now[0] += 119
    assert guard.wish() is None
    now[0] += 1
    assert guard.wish() == "time_limit"
    assert StopGuard(0, say=lambda _: None, clock=lambda: 1e18).wish() is None


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
    with StopGuard(0, say=said.append) as guard:
        signal.raise_signal(number)
        assert guard.wish() == reason
    assert signal.getsignal(number) is before
    assert len(said) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopGuard(0, say=lambda _: None) as guard:
            signal.raise_signal(signal.SIGHUP)
            assert guard.wish() is None
    finally:
        signal.signal(signal.SIGHUP, before)
