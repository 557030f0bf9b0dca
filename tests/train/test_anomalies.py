"""Losses that are no number, and losses that jump: planted, noticed, survived."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.builders import build_trainer
from gptforge.checkpoint.store import read_state
from gptforge.errors import RunError
from gptforge.train.loss_monitor import LossMonitor
from gptforge.train.trainer import Trainer
from tests.train.runs import StopAfter, build, events, last


def poison(trainer: Trainer, positions: set[int], value: float = math.nan) -> None:
    """Make the loss of the batches at some places in the stream go wrong."""
    update, steps_at = trainer.step_fn, trainer.dataloader

    class Poisoned(type(update)):
        def _learn(self, x, y, scale):
            # The loader has moved on by the batch that is being learned.
            here = steps_at.position - trainer.config.global_batch_size
            factor = value if here in positions else 1.0
            return super()._learn(x, y, scale * factor) * factor

    update.__class__ = Poisoned


def test_a_batch_that_breaks_the_loss_changes_no_weight_and_is_reported(config) -> None:
    trainer = build(config)
    poison(trainer, {8 * 5})
    before = {}

    def learn(step=trainer.step_fn):
        if trainer.state.step in (5, 6):
            weights = [p.detach().clone() for p in step.model.parameters()]
            steps = [float(s["step"]) for s in step.optimizer.state.values()]
            before[trainer.state.step] = (weights, steps)

    original = trainer.train_step

    def watched():
        learn()
        return original()

    trainer.train_step = watched
    assert trainer.fit() == "finished"
    for left, right in zip(before[5][0], before[6][0], strict=True):
        assert torch.equal(left, right)
    assert before[5][1] == before[6][1]
    (found,) = events(config, "anomaly")
    assert (found["kind"], found["step"], found["loss"]) == ("not_finite", 5, None)
    assert found["windows"] == trainer.dataloader.sequence_ids_at(8 * 5)
    assert "anomaly at step 5, epoch" in (Path(config.out_dir) / "log.md").read_text()
    assert all(p.isfinite().all() for p in trainer.step_fn.model.parameters())


def test_a_spike_is_reported_with_its_place_and_learned_from(config) -> None:
    config = dataclasses.replace(config, max_steps=40)
    trainer = build(config)
    poison(trainer, {8 * 30}, value=3.0)
    assert trainer.fit() == "finished"
    (found,) = events(config, "anomaly")
    assert (found["kind"], found["step"]) == ("spike", 30)
    assert found["windows"] == trainer.dataloader.sequence_ids_at(8 * 30)


def test_many_bad_steps_lead_back_to_the_last_good_checkpoint_and_past_the_data(config) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    poison(trainer, {8 * step for step in range(8, 13)})
    assert trainer.fit() == "finished"
    back = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    # The newest checkpoint is the best one, of step 8; steps 8 to 12 were bad.
    assert [event["checkpoint"] for event in back] == ["step-000008"]
    assert back[0]["bad_steps"] == [8, 9, 10, 11, 12]
    assert back[0]["left_out"] == [64, 104]
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.dataloader.position == 8 * 25
    # The run went on behind the step where it diverged, so the rollback no longer counts.
    assert trainer.state.rollbacks == 0
    assert read_state(last(config))["progress"]["returns"] == 0


def test_after_a_few_returns_the_run_stops_with_the_reason(config) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    poison(trainer, {8 * step for step in range(8, 1000)})
    with pytest.raises(RunError, match=r"3 returns did not help.*--max_lr"):
        trainer.fit()
    # Two of them went to the same step, so an older one was tried; the best one is still there.
    back = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    assert [event["checkpoint"] for event in back] == ["step-000004"]
    assert last(config).name == "step-000004"
    assert trainer.saver.store.read_link("best").name == "step-000008.diverged-1"


def break_weights(trainer: Trainer, calls: set[int], factor: float = 1e30) -> None:
    """Multiply the weights after some of the calls of the step, as a bad update would."""
    update, count = trainer.step_fn, [0]
    call = type(update).__call__

    class Broken(type(update)):
        def __call__(self, *args, **kwargs):
            if count[0] in calls:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.mul_(factor)
            count[0] += 1
            return call(self, *args, **kwargs)

    update.__class__ = Broken


def rollbacks(config) -> list[str]:
    lines = (Path(config.out_dir) / "log.md").read_text().splitlines()
    return [line.partition("back to ")[2].partition(";")[0] for line in lines if "back to" in line]


def test_broken_weights_are_not_saved_in_their_streak(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, max_steps=24)
    trainer = build(config)
    break_weights(trainer, {16})
    assert trainer.fit() == "finished"
    assert rollbacks(config) == ["step-000012"]
    assert [event["step"] for event in events(config, "train")] == list(range(24))
    assert math.isfinite(trainer.state.loss)


def test_a_save_put_off_in_a_streak_is_made_by_the_next_good_step(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, save_every=10)
    trainer = build(config)
    poison(trainer, {8 * 8, 8 * 9, 8 * 10})
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(config, "save")] == [12, 20]


def test_a_streak_goes_on_over_a_stop_and_leads_back_before_it(config) -> None:
    config = dataclasses.replace(config, eval_every=1000)
    trainer = build(config)
    break_weights(trainer, {14})
    trainer.stop_signal = StopAfter(17)
    assert trainer.fit() == "interrupted"
    assert last(config).name == "step-000017"
    assert read_state(last(config))["progress"]["bad_steps"] == 3
    assert build(config).fit() == "finished"
    assert rollbacks(config) == ["step-000012"]
    # Nothing of the abandoned steps is left to be found.
    assert not [path.name for path in last(config).parent.iterdir() if "diverged" in path.name]


def test_rollbacks_are_forgotten_once_a_run_got_on(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, max_steps=100)
    trainer = build(config)
    break_weights(trainer, {13, 33, 53, 73, 93})
    assert trainer.fit() == "finished"
    assert len([e for e in events(config, "train") if e["loss"] is not None]) == 100
    assert trainer.state.diverged_at > 60 and trainer.state.rollbacks == 0


def test_the_best_model_survives_a_rollback_behind_it(config) -> None:
    trainer = build(config)
    # Twice wrong from the same checkpoint on: the one before it is taken, the best one is kept.
    poison(trainer, {8 * step for step in range(8, 18)})
    assert trainer.fit() == "finished"
    (event,) = (e for e in events(config, "anomaly") if e["kind"] == "return")
    assert event["checkpoint"] != "step-000008"
    assert trainer.state.best_step > 8
    best = trainer.saver.store.read_link("best")
    assert read_state(best)["progress"]["best_step"] == trainer.state.best_step
    assert build_trainer(config, explicit=(), log=lambda _: None) is None


def test_a_run_that_breaks_down_before_anything_was_saved_says_so(config) -> None:
    trainer = build(config)
    with torch.no_grad():
        trainer.step_fn.model.transformer["wpe"].weight.fill_(math.nan)
    with pytest.raises(RunError, match="nothing was saved yet"):
        trainer.fit()


def test_a_spike_is_measured_against_the_spread_of_recent_losses() -> None:
    watch = LossMonitor(lag=2, uses_grad_scaler=False)
    quiet = [3.0 + 0.05 * math.sin(7 * i) for i in range(40)]
    found = []
    for step, loss in enumerate([*quiet, 4.5, 3.0, 3.2]):
        found += watch.update(step, 0, torch.tensor(loss), torch.tensor(1.0))
    found += watch.flush()
    assert [(anomaly.kind, anomaly.step) for anomaly in found] == [("spike", 40)]


def test_an_overflow_that_the_scaler_provoked_is_no_anomaly() -> None:
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    assert LossMonitor(lag=0, uses_grad_scaler=True).update(0, 0, one, inf) == []
    assert LossMonitor(lag=0, uses_grad_scaler=False).update(0, 0, one, inf)[0].kind == "not_finite"
    assert LossMonitor(lag=0, uses_grad_scaler=True).update(0, 0, inf, inf)[0].bad_steps == 1


def test_a_loss_is_read_only_when_it_is_old_enough() -> None:
    class Unread:
        device = torch.device("cpu")

        def __float__(self) -> float:
            raise AssertionError("read too early")

    watch = LossMonitor(lag=2, uses_grad_scaler=False)
    watch.update(0, 0, torch.tensor(1.0), torch.tensor(1.0))
    assert watch.update(1, 0, Unread(), Unread()) == []
    assert watch.update(2, 0, Unread(), Unread()) == []
