"""Signals and the time limit, also during evaluations."""

import dataclasses
import itertools
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_tensors
from gptforge.training import signals
from gptforge.training.signals import StopSignal
from gptforge.training.trainer import Trainer
from tests.training.runs import build, events, last


def interrupt_evaluations(trainer: Trainer, after_batches: int) -> None:
    """Send SIGTERM in the first evaluation, behind so many batches."""
    assert trainer.val_evaluator is not None
    evaluate = trainer.val_evaluator.evaluate

    def interrupted(*args, should_stop, **kwargs):
        batches = itertools.count(1)

        def should_stop_or_signal() -> bool:
            # A second signal would end the process, in the final evaluation.
            if next(batches) == after_batches and not trainer.stop_signal.should_stop():
                signal.raise_signal(signal.SIGTERM)
            return should_stop()

        return evaluate(*args, should_stop=should_stop_or_signal, **kwargs)

    trainer.val_evaluator.evaluate = interrupted


def test_signal_in_the_final_evaluation(config, tmp_path) -> None:
    config = dataclasses.replace(config, eval_every=1000)
    assert build(config).fit() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))
    trainer = build(other)
    interrupt_evaluations(trainer, after_batches=1)
    assert trainer.fit() == "terminated"
    assert last(other).name == f"step-{config.max_steps:06d}"
    assert events(other, "eval") == []
    assert build(other).fit() == "finished"
    for key in ("val_loss", "step"):
        assert [e[key] for e in events(other, "eval")] == [e[key] for e in events(config, "eval")]
    assert build_trainer(other, explicit=()) == "finished"


@pytest.mark.parametrize("batches", [1, 2])
def test_interrupted_evaluations_change_no_result(config, tmp_path, batches) -> None:
    config = dataclasses.replace(
        config, max_steps=8, keep_checkpoints=0, save_every=1000, sample_every=4, max_lr=0.1,
        val_fraction=0.2,
    )  # fmt: skip
    assert build(config).fit() == "finished"
    other = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))
    reasons = []
    while reasons[-1:] != ["finished"]:
        trainer = build(other)
        interrupt_evaluations(trainer, batches)
        reasons.append(trainer.fit())
        if len(reasons) == 1:
            assert last(other).name == f"step-{config.eval_every:06d}"
            assert events(other, "eval") == []
        assert len(reasons) < 40
    assert len(reasons) > 3
    for kind in ("train", "eval"):
        fields = ("step", "loss", "norm", "val_loss", "val_bpb")
        left, right = (
            [[e.get(name) for name in fields] for e in events(c, kind)] for c in (config, other)
        )
        assert left == right
    for file in ("model", "optimizer"):
        left, right = (read_tensors(last(c), f"{file}.safetensors") for c in (config, other))
        assert all(torch.equal(left[name], right[name]) for name in left)
    samples = [
        (Path(c.out_dir) / "samples.md").read_text().split("\n", 1)[1] for c in (config, other)
    ]
    assert samples[0] == samples[1]
    left, right = (last(c).parent for c in (config, other))
    assert sorted(p.name for p in left.iterdir()) == sorted(p.name for p in right.iterdir())
    assert (left / "best").readlink() == (right / "best").readlink()
    assert build_trainer(other, explicit=()) == "finished"


def set_clock(monkeypatch, start: float) -> list[float]:
    """The time that signals.py sees; the caller changes it."""
    now = [start]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_time_limit_stops_an_evaluation(config, monkeypatch) -> None:
    now = set_clock(monkeypatch, 0.0)
    trainer = build(config)
    trainer.stop_signal = StopSignal(1)
    assert trainer.val_evaluator is not None
    evaluate = trainer.val_evaluator.evaluate

    def late(*args, **kwargs):
        now[0] = 61.0
        return evaluate(*args, **kwargs)

    trainer.val_evaluator.evaluate = late
    assert trainer.fit() == "time_limit"
    assert events(config, "eval") == []
    assert last(config).name == f"step-{config.eval_every:06d}"


def test_time_limit_counts_from_the_start_but_leaves_a_second(monkeypatch) -> None:
    now = set_clock(monkeypatch, 100.0)
    stop_signal = StopSignal(1, started=30.0)
    assert stop_signal.stop_reason() == "time_limit"
    with stop_signal:
        assert stop_signal.stop_reason() is None
        now[0] += 1
        assert stop_signal.stop_reason() == "time_limit"


def test_time_limit_is_in_minutes(monkeypatch) -> None:
    now = set_clock(monkeypatch, 100.0)
    stop_signal, unlimited = StopSignal(2), StopSignal(0)
    assert stop_signal.stop_reason() is None
    now[0] += 119
    assert stop_signal.stop_reason() is None
    now[0] += 1
    assert stop_signal.stop_reason() == "time_limit"
    now[0] = 1e18
    assert unlimited.stop_reason() is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "terminated"),
        (getattr(signal, "SIGHUP", signal.SIGTERM), "terminated"),
    ],
)
def test_signal_gives_a_stop_reason_and_the_old_handler_is_restored(
    number, reason, messages
) -> None:
    before = signal.getsignal(number)
    with StopSignal(0) as stop_signal:
        signal.raise_signal(number)
        assert stop_signal.stop_reason() == reason
    assert signal.getsignal(number) is before
    assert len(messages) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_ignored_sighup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(0) as stop_signal:
            signal.raise_signal(signal.SIGHUP)
            assert stop_signal.stop_reason() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("other", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("is_first", [True, False])
def test_sighup_beside_another_signal_still_lets_it_save(other, is_first, monkeypatch) -> None:
    exit_codes: list[int] = []
    monkeypatch.setattr("os._exit", exit_codes.append)
    now = set_clock(monkeypatch, 100.0)
    numbers = [signal.SIGHUP, getattr(signal, other)]
    with StopSignal(0) as stop_signal:
        for number in numbers if is_first else reversed(numbers):
            signal.raise_signal(number)
        assert stop_signal.stop_reason() in ("interrupted", "terminated")
        assert exit_codes == []
        if other != "SIGHUP":
            now[0] += signals.REPEAT_SECONDS
            signal.raise_signal(numbers[1])
            assert exit_codes == [128 + numbers[1]]


def test_second_signal_ends_the_process_unless_it_is_the_first_one_passed_on(monkeypatch) -> None:
    exit_codes: list[int] = []
    monkeypatch.setattr("os._exit", exit_codes.append)
    now = set_clock(monkeypatch, 100.0)
    with StopSignal(0):
        signal.raise_signal(signal.SIGTERM)
        now[0] += signals.REPEAT_SECONDS / 2
        # SLURM sends it to all processes, and torchrun passes it on to its ranks.
        signal.raise_signal(signal.SIGTERM)
        assert exit_codes == []
        now[0] += signals.REPEAT_SECONDS / 2
        signal.raise_signal(signal.SIGINT)
        assert exit_codes == [128 + signal.SIGINT]
