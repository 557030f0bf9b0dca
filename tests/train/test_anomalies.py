"""Losses that are no number, and losses that jump: planted, noticed, survived."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.checkpoint.store import read_state
from gptforge.errors import RunError
from gptforge.train.anomalies import Watch
from gptforge.train.trainer import Trainer
from tests.train.runs import build, events, last


def poison(trainer: Trainer, positions: set[int], value: float = math.nan) -> None:
    """Make the loss of the batches at some places in the stream go wrong."""
    update, steps_at = trainer.train_step, trainer.loader

    class Poisoned(type(update)):
        def _learn(self, x, y, scale):
            # The loader has moved on by the batch that is being learned.
            here = steps_at.position - trainer.config.global_batch
            factor = value if here in positions else 1.0
            return super()._learn(x, y, scale * factor) * factor

    update.__class__ = Poisoned


def test_a_batch_that_breaks_the_loss_changes_no_weight_and_is_reported(config) -> None:
    trainer = build(config)
    poison(trainer, {8 * 5})
    before = {}

    def learn(step=trainer.train_step):
        if trainer.progress.step in (5, 6):
            weights = [p.detach().clone() for p in step.model.parameters()]
            steps = [float(s["step"]) for s in step.optimizer.state.values()]
            before[trainer.progress.step] = (weights, steps)

    original = trainer.learn

    def watched():
        learn()
        return original()

    trainer.learn = watched
    assert trainer.run() == "finished"
    for left, right in zip(before[5][0], before[6][0], strict=True):
        assert torch.equal(left, right)
    assert before[5][1] == before[6][1]
    (found,) = events(config, "anomaly")
    assert (found["kind"], found["step"], found["loss"]) == ("not_finite", 5, None)
    assert found["windows"] == trainer.loader.windows_at(8 * 5)
    assert "anomaly at step 5, epoch" in (Path(config.out_dir) / "log.md").read_text()
    assert all(p.isfinite().all() for p in trainer.train_step.model.parameters())


def test_a_spike_is_reported_with_its_place_and_learned_from(config) -> None:
    config = dataclasses.replace(config, max_steps=40)
    trainer = build(config)
    poison(trainer, {8 * 30}, value=3.0)
    assert trainer.run() == "finished"
    (found,) = events(config, "anomaly")
    assert (found["kind"], found["step"]) == ("spike", 30)
    assert found["windows"] == trainer.loader.windows_at(8 * 30)


def test_many_bad_steps_lead_back_to_the_last_good_checkpoint_and_past_the_data(config) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    poison(trainer, {8 * step for step in range(8, 13)})
    assert trainer.run() == "finished"
    back = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    # The newest checkpoint is the best one, of step 8; steps 8 to 12 were bad.
    assert [event["checkpoint"] for event in back] == ["step-000008"]
    assert back[0]["bad_steps"] == [8, 9, 10, 11, 12]
    assert back[0]["left_out"] == [64, 104]
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.loader.position == 8 * 25
    assert trainer.progress.returns == 1
    assert read_state(last(config))["progress"]["returns"] == 1


def test_after_a_few_returns_the_run_stops_with_the_reason(config) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    poison(trainer, {8 * step for step in range(8, 1000)})
    with pytest.raises(RunError, match=r"3 returns did not help.*--max_lr"):
        trainer.run()
    assert last(config).name == "step-000008"


def test_a_run_that_breaks_down_before_anything_was_saved_says_so(config) -> None:
    trainer = build(config)
    with torch.no_grad():
        trainer.train_step.model.transformer["wpe"].weight.fill_(math.nan)
    with pytest.raises(RunError, match="nothing was saved yet"):
        trainer.run()


def test_a_spike_is_measured_against_the_spread_of_recent_losses() -> None:
    watch = Watch(lag=2, scaled=False)
    quiet = [3.0 + 0.05 * math.sin(7 * i) for i in range(40)]
    found = []
    for step, loss in enumerate([*quiet, 4.5, 3.0, 3.2]):
        found += watch.add(step, 0, torch.tensor(loss), torch.tensor(1.0))
    found += watch.settle()
    assert [(anomaly.kind, anomaly.step) for anomaly in found] == [("spike", 40)]


def test_an_overflow_that_the_scaler_provoked_is_no_anomaly() -> None:
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    assert Watch(lag=0, scaled=True).add(0, 0, one, inf) == []
    assert Watch(lag=0, scaled=False).add(0, 0, one, inf)[0].kind == "not_finite"
    assert Watch(lag=0, scaled=True).add(0, 0, inf, inf)[0].in_a_row == 1


def test_a_loss_is_read_only_when_it_is_old_enough() -> None:
    class Unread:
        device = torch.device("cpu")

        def __float__(self) -> float:
            raise AssertionError("read too early")

    watch = Watch(lag=2, scaled=False)
    watch.add(0, 0, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.add(1, 0, Unread(), Unread()) == []
    assert watch.add(2, 0, Unread(), Unread()) == []
