"""Runs with injected NaN losses and loss spikes."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_state
from gptforge.errors import RunError
from gptforge.training.loss_monitor import LossMonitor
from gptforge.training.trainer import Trainer
from tests.training.runs import StopAfter, build, events, last


def poison(trainer: Trainer, positions: set[int], factor: float = math.nan) -> None:
    """Multiply the loss of the batches at these positions of the dataloader."""
    forward_backward = trainer.step_fn.backend.forward_backward

    def poisoned(x, y, scale):
        # The dataloader is already behind the current batch.
        position = trainer.dataloader.position - trainer.config.global_batch_size
        f = factor if position in positions else 1.0
        return forward_backward(x, y, scale * f) * f

    trainer.step_fn.backend.forward_backward = poisoned


def test_nan_loss_changes_nothing_and_is_reported(config) -> None:
    trainer = build(config)
    poison(trainer, {8 * 5})
    before = {}
    train_step = trainer.train_step

    def watched():
        step_fn, step = trainer.step_fn, trainer.state.step
        if step in (5, 6):
            weights = [p.detach().clone() for p in step_fn.model.parameters()]
            counts = [float(s["step"]) for s in step_fn.optimizer.state.values()]
            before[step] = (weights, counts)
        return train_step()

    trainer.train_step = watched
    assert trainer.fit() == "finished"
    for left, right in zip(before[5][0], before[6][0], strict=True):
        assert torch.equal(left, right)
    assert before[5][1] == before[6][1]
    [event] = events(config, "anomaly")
    assert (event["kind"], event["step"], event["loss"]) == ("not_finite", 5, None)
    assert event["windows"] == trainer.dataloader.sequence_ids_at(8 * 5)
    assert "anomaly at step 5, epoch" in (Path(config.out_dir) / "log.md").read_text()
    assert all(p.isfinite().all() for p in trainer.step_fn.model.parameters())


def test_spike_is_reported_and_trained_on(config) -> None:
    config = dataclasses.replace(config, max_steps=40)
    trainer = build(config)
    poison(trainer, {8 * 30}, factor=3.0)
    assert trainer.fit() == "finished"
    [event] = events(config, "anomaly")
    assert (event["kind"], event["step"]) == ("spike", 30)
    assert event["windows"] == trainer.dataloader.sequence_ids_at(8 * 30)


@pytest.mark.parametrize("lag", [0, 2])  # on a GPU, losses are read later
def test_streak_of_bad_steps_rolls_back_and_skips_the_data(config, lag) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    trainer.loss_monitor = LossMonitor(lag=lag, uses_grad_scaler=False)
    poison(trainer, {8 * step for step in range(8, 13)})
    assert trainer.fit() == "finished"
    rollbacks = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    # The latest checkpoint is the best one, of step 8; steps 8 to 12 were bad.
    assert [event["checkpoint"] for event in rollbacks] == ["step-000008"]
    assert rollbacks[0]["bad_steps"] == [8, 9, 10, 11, 12]
    assert rollbacks[0]["left_out"] == [64, 104 + 8 * lag]
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.dataloader.position == 8 * (25 + lag)
    # Training got past the step where it diverged, so the rollback no longer counts.
    assert trainer.state.rollbacks == 0
    assert read_state(last(config))["progress"]["returns"] == 0


def test_run_fails_after_several_rollbacks(config) -> None:
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    poison(trainer, {8 * step for step in range(8, 1000)})
    with pytest.raises(RunError, match=r"3 rollbacks did not help.*--max_lr"):
        trainer.fit()
    # Two went to the same step, so an older one was tried; the best one is still there.
    rollbacks = [event for event in events(config, "anomaly") if event["kind"] == "return"]
    assert [event["checkpoint"] for event in rollbacks] == ["step-000004"]
    assert last(config).name == "step-000004"
    assert trainer.saver.store.read_link("best").name == "step-000008.diverged-1"


def break_weights(trainer: Trainer, calls: set[int], factor: float = 1e30) -> None:
    """Multiply the weights before some of the steps, as a bad update would."""
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


def rollback_targets(config) -> list[str]:
    lines = (Path(config.out_dir) / "log.md").read_text().splitlines()
    return [line.partition("back to ")[2].partition(";")[0] for line in lines if "back to" in line]


def test_broken_weights_are_not_saved(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, max_steps=24)
    trainer = build(config)
    break_weights(trainer, {16})
    assert trainer.fit() == "finished"
    assert rollback_targets(config) == ["step-000012"]
    assert [event["step"] for event in events(config, "train")] == list(range(24))
    assert math.isfinite(trainer.state.loss)


def test_save_in_a_streak_waits_for_the_next_good_step(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, save_every=10)
    trainer = build(config)
    poison(trainer, {8 * 8, 8 * 9, 8 * 10})
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(config, "save")] == [1, 12, 20]


def test_new_best_loss_ends_a_streak_as_after_a_resume(config, monkeypatch) -> None:
    # Evaluated within the streak of steps 6 to 11, as if the average of the weights had improved.
    best = [(4, 2.0), (8, 1.0)]
    config = dataclasses.replace(config, save_every=50)
    trainer = build(config)
    count_eval = type(trainer.state).count_eval
    monkeypatch.setattr(
        type(trainer.state),
        "count_eval",
        lambda state, c, loss: count_eval(state, c, dict(best).get(state.step, 3.0)),
    )
    poison(trainer, {8 * step for step in range(6, 12)})
    assert trainer.fit() == "finished"
    assert rollback_targets(config) == []


def test_streak_continues_after_a_resume(config) -> None:
    config = dataclasses.replace(config, eval_every=1000)
    trainer = build(config)
    break_weights(trainer, {14})
    trainer.stop_signal = StopAfter(17)
    assert trainer.fit() == "interrupted"
    assert last(config).name == "step-000017"
    assert read_state(last(config))["progress"]["bad_steps"] == 3
    assert build(config).fit() == "finished"
    assert rollback_targets(config) == ["step-000012"]
    # Nothing of the discarded steps is left.
    assert not [path.name for path in last(config).parent.iterdir() if "diverged" in path.name]


def test_rollbacks_are_reset_after_progress(config) -> None:
    config = dataclasses.replace(config, eval_every=1000, max_steps=100)
    trainer = build(config)
    break_weights(trainer, {13, 33, 53, 73, 93})
    assert trainer.fit() == "finished"
    assert len([e for e in events(config, "train") if e["loss"] is not None]) == 100
    assert trainer.state.diverged_at > 60 and trainer.state.rollbacks == 0


def test_best_checkpoint_survives_a_rollback_behind_it(config) -> None:
    trainer = build(config)
    # It diverges twice from the same checkpoint: the one before is restored, the best one is kept.
    poison(trainer, {8 * step for step in range(8, 18)})
    assert trainer.fit() == "finished"
    (event,) = (e for e in events(config, "anomaly") if e["kind"] == "return")
    assert event["checkpoint"] != "step-000008"
    assert trainer.state.best_step > 8
    best = trainer.saver.store.read_link("best")
    assert read_state(best)["progress"]["best_step"] == trainer.state.best_step
    assert build_trainer(config, explicit=()) == "finished"


def test_divergence_before_the_first_save(config) -> None:
    trainer = build(config)
    with torch.no_grad():
        trainer.step_fn.model.transformer["wpe"].weight.fill_(math.nan)
    with pytest.raises(RunError, match="nothing was saved yet"):
        trainer.fit()
