"""Training stops where the held-out loss no longer improves."""

import dataclasses

import pytest

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.run_dir import resume_config
from gptforge.config import Config
from gptforge.config_file import read_toml, to_toml
from gptforge.errors import UserError
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.report.format import ValLoss
from gptforge.training import trainer as trainer_module
from gptforge.training.state import resolve_patience
from tests.distributed.spawn import on_ranks
from tests.training.runs import StopAfter, build, events, last

LOSSES = [3.0, 2.0, 2.1, float("nan"), 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]


def script_losses(patch, losses=LOSSES) -> None:
    """Let the n-th evaluation of a process, at step 2n, have the n-th loss."""
    left = iter(losses)
    patch.setattr(ValEvaluator, "evaluate", lambda *_, **__: ValLoss(next(left), 1, 1, 1))
    # A resumed run would take one more at its end.
    patch.setattr(trainer_module, "evaluate_best", lambda trainer, reason: reason)


@pytest.fixture
def config(config):
    return dataclasses.replace(config, eval_every=2, patience=3)


def test_run_stops_after_so_many_evaluations_without_a_better_loss(
    config, monkeypatch, messages
) -> None:
    script_losses(monkeypatch)
    trainer = build(config)
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 10
    assert last(config).name == "step-000010"
    (end,) = events(config, "end")
    assert (end["reason"], end["step"]) == ("early_stop", 10)
    out = "\n".join(messages)
    assert "Stopped early at step 10 of 20: no better held-out loss since step 4 (saved" in out
    assert "Sample:" in out
    # The same command finds it finished.
    assert build_trainer(config, explicit=()) == "finished"
    assert "is finished: it stopped early at step 10 of 20" in messages[-1]


def test_count_survives_an_interruption(config, monkeypatch) -> None:
    script_losses(monkeypatch)
    for steps in (5, 4):
        trainer = build(config)
        trainer.stop_signal = StopAfter(steps)
        assert trainer.fit() == "interrupted"
    assert trainer.state.evals_since_best == 2
    trainer = build(config)
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 10


def test_more_patience_trains_on(config, monkeypatch) -> None:
    script_losses(monkeypatch)
    build(config).fit()
    patient = dataclasses.replace(config, patience=4)
    trainer = build_trainer(patient, explicit={"patience"})
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 12
    trainer = build_trainer(dataclasses.replace(config, patience=0), explicit={"patience"})
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(config, "train")] == list(range(20))


def test_more_steps_train_on_and_restart_the_count(config, monkeypatch) -> None:
    script_losses(monkeypatch)
    build(config).fit()
    trainer = build(dataclasses.replace(config, max_steps=30))
    assert trainer.state.evals_since_best == 0
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 16


def test_report_is_completed_after_a_crash(config, monkeypatch) -> None:
    script_losses(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("gptforge.report.run_report.RunReport.finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer = build(config)
            trainer.fit()
    trainer.lock.release()
    trainer = build(config)
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 10
    assert len(events(config, "end")) == 1


def test_evaluations_before_the_decay_of_wsd_do_not_count(config, monkeypatch) -> None:
    script_losses(monkeypatch)
    wsd = dataclasses.replace(config, schedule="wsd", decay_fraction=0.5)
    trainer = build(wsd)
    assert trainer.fit() == "early_stop"
    assert trainer.state.step == 10 + 2 * 3


def test_command_exits_with_0_and_does_not_offer_to_resume(
    program, play, monkeypatch, tmp_path
) -> None:
    script_losses(monkeypatch)
    flags = ["--preset", "debug", "--input", play, "--device", "cpu", "--patience", 3]
    flags += ["--eval_every", 2, "--out_dir", tmp_path / "run"]
    done = program(*flags)
    assert done.code == 0
    assert "Stopped early at step 10 of 20" in done.out
    assert "Resume with" not in done.out
    assert "early stopping: after 3 evaluations without a better held-out loss" in done.out
    done = program(*flags)
    assert done.code == 0
    assert "is finished: it stopped early" in done.out


def train_scripted(comm, config: dict) -> list:
    with pytest.MonkeyPatch.context() as patch:
        script_losses(patch)
        trainer = build_trainer(Config(**config), explicit=(), comm=comm)
        return [trainer.fit(), trainer.state.step]


def test_all_ranks_stop_at_the_same_step(config) -> None:
    assert on_ranks(2, train_scripted, vars(config)) == [["early_stop", 10]] * 2


def test_automatic_patience_is_for_repeated_text_only() -> None:
    config = Config(max_steps=1000, eval_every=50, preset="shakespeare")

    def resolve(epochs: float, *, has_val: bool = True, **changes) -> int:
        changed = dataclasses.replace(config, **changes)
        tokens = round(config.max_steps * config.tokens_per_step / epochs)
        return resolve_patience(changed, train_tokens=tokens, has_val=has_val)

    assert resolve(3.9) == 0
    assert resolve(4.1) == 5
    assert resolve(80, eval_every=10) == 20  # a fifth of the steps
    assert resolve(80, preset="gpt2-medium") == 0
    assert resolve(80, has_val=False) == 0
    assert resolve(80, patience=0) == 0
    assert resolve(1, patience=7, preset="gpt2") == 7
    with pytest.raises(UserError, match="--patience 7 compares held-out losses"):
        resolve(80, patience=7, has_val=False)


def test_runs_from_before_early_stopping_make_all_their_steps(config, tmp_path) -> None:
    path = tmp_path / "config.toml"
    text = to_toml(dataclasses.replace(config, patience=-1), {"command": ""})
    path.write_text(text.replace("patience = -1\n", ""))
    assert read_toml(path)[0]["patience"] == 0
    # A resumed run keeps its patience, unless the flag says otherwise.
    trainer = build(dataclasses.replace(config, patience=0))
    trainer.stop_signal = StopAfter(1)
    trainer.fit()
    checkpoint, automatic = last(config), dataclasses.replace(trainer.config, patience=-1)
    rest = {"tokenizer": trainer.tokenizer, "text_sha256": trainer.text_sha256}
    for explicit, patience in ((set(), 0), ({"patience"}, -1)):
        resumed = resume_config(checkpoint, automatic, explicit=explicit, **rest)
        assert resumed.patience == patience
