"""Runs whose --max_steps is raised."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from gptforge.checkpoint.format import read_state, read_tensors, step_from_path
from gptforge.checkpoint.store import CheckpointStore
from gptforge.report.run_info import read_run
from gptforge.report.verdict import verdict
from tests.training.runs import StopAfter, build, events, last


def store_of(config) -> CheckpointStore:
    return CheckpointStore(Path(config.out_dir) / "checkpoints")


@pytest.fixture
def wsd(config):
    """Decays from step 16 on."""
    return dataclasses.replace(config, schedule="wsd", keep_checkpoints=0, save_every=100)


def test_finished_wsd_run_resumes_from_before_its_decay(wsd, tmp_path, messages) -> None:
    straight = dataclasses.replace(wsd, max_steps=30, out_dir=str(tmp_path / "straight"))
    build(straight).fit()
    build(wsd).fit()
    assert store_of(wsd).path_of(16).is_dir()

    longer = dataclasses.replace(wsd, max_steps=30)
    trainer = build(longer)
    assert trainer.state.step == 16
    assert (
        "note: --max_steps raised from 20 to 30: resuming from step-000016, before the decay of "
        "the learning rate; the 4 steps after it are dropped and trained again"
    ) in messages
    assert trainer.fit() == "finished"
    # As if it had been a run of 30 steps from the start.
    for kind, names in (("train", ("step", "loss", "norm", "lr")), ("eval", ("step", "val_loss"))):
        one, two = events(straight, kind), events(longer, kind)
        assert [[e[n] for n in names] for e in one] == [[e[n] for n in names] for e in two]
    for name in ("model", "optimizer"):
        one, two = (read_tensors(last(c), f"{name}.safetensors") for c in (straight, longer))
        assert all(torch.equal(one[key], two[key]) for key in one)
    # The checkpoint from before the new decay is kept, that from before the old one no more.
    assert store_of(longer).path_of(24).is_dir()
    assert not store_of(longer).path_of(16).is_dir()


def test_best_checkpoint_of_a_dropped_decay_is_kept_until_it_is_beaten(wsd) -> None:
    build(wsd).fit()
    store = store_of(wsd)
    assert store.read_link("best").name == "step-000020"
    best_loss = read_state(last(wsd))["progress"]["best_loss"]
    longer = dataclasses.replace(wsd, max_steps=30)
    trainer = build(longer)
    assert not store.path_of(20).is_dir()
    trainer.stop_signal = StopAfter(1)
    assert trainer.fit() == "interrupted"
    # Also after another start, which repairs the links.
    trainer = build(longer)
    assert trainer.state.step == 17
    assert (trainer.state.best_step, trainer.state.best_loss) == (20, best_loss)
    assert store.read_link("best").name == "step-000020.decayed-1"
    assert trainer.fit() == "finished"
    best = store.read_link("best")
    assert best.name == f"step-{trainer.state.best_step:06d}" != "step-000020"
    assert not list(store.folder.glob("*.decayed-*"))


def test_best_of_a_dropped_decay_is_reported_until_it_is_beaten(wsd) -> None:
    build(wsd).fit()
    [*_, best] = events(wsd, "eval")
    longer = dataclasses.replace(wsd, max_steps=30)
    folder = Path(wsd.out_dir)
    for steps in (1, 1, 2):  # the second one resumes after the extension
        trainer = build(longer)
        report = read_run(folder)  # as if it were killed here
        assert [event["step"] for event in events(longer, "eval")] == [4, 8, 12, 16]
        assert (report.history.best["step"], report.history.best["val_loss"]) == (
            best["step"], best["val_loss"],
        )  # fmt: skip
        summary = verdict(report.history, max_steps=30, out_dir="x", has_val=True)
        assert f"{best['val_loss']:.4f} nats per token" in summary
        assert "at step 20 of 30" in summary and "steps were then dropped" in summary
        trainer.stop_signal = StopAfter(steps)
        assert trainer.fit() == "interrupted"
    assert build(longer).fit() == "finished"
    found = read_run(folder).history
    assert found.best_eval in found.evals
    assert found.best["step"] == step_from_path(store_of(longer).read_link("best"))


def test_wsd_run_killed_right_after_its_extension_resumes(wsd) -> None:
    build(wsd).fit()
    best_loss = read_state(last(wsd))["progress"]["best_loss"]
    longer = dataclasses.replace(wsd, max_steps=30)
    for _ in range(2):
        build(longer).lock.release()
        assert last(wsd).name == "step-000016"
    trainer = build(longer)
    # Step 16 does not know it.
    assert (trainer.state.best_step, trainer.state.best_loss) == (20, best_loss)
    assert store_of(longer).read_link("best").name == "step-000020.decayed-1"
    assert trainer.fit() == "finished"
    assert [event["step"] for event in events(longer, "train")] == list(range(30))
    assert not list(store_of(longer).folder.glob("*.decayed-*"))


def test_wsd_run_killed_between_a_rename_and_its_link_keeps_its_best_checkpoint(wsd) -> None:
    build(wsd).fit()
    store, longer = store_of(wsd), dataclasses.replace(wsd, max_steps=30)
    build(longer).lock.release()
    (store.folder / "best").unlink()
    assert build(wsd).state.best_step == 20  # also with the old --max_steps
    assert store.read_link("best").name == "step-000020.decayed-1"
    diverged = store.folder / "step-000020.diverged-1"
    (store.folder / "step-000020.decayed-1").rename(diverged)
    assert store.renamed_best(last(wsd)) == diverged
    (diverged / "model.safetensors").write_bytes(b"damaged")
    assert store.renamed_best(last(wsd)) is None


def test_unfinished_wsd_run_before_its_decay_resumes_from_its_last_step(wsd, messages) -> None:
    trainer = build(wsd)
    trainer.stop_signal = StopAfter(15)
    trainer.fit()
    assert build(dataclasses.replace(wsd, max_steps=30)).state.step == 15
    assert any(line.endswith("follows the new schedule from here") for line in messages)


def test_wsd_run_without_the_checkpoint_before_its_decay_reports_the_jump(wsd, messages) -> None:
    build(wsd).fit()
    shutil.rmtree(store_of(wsd).path_of(16))
    trainer = build(dataclasses.replace(wsd, max_steps=30))
    assert trainer.state.step == 20
    assert (
        "note: --max_steps raised from 20 to 30: the learning rate follows the new schedule from "
        "here and jumps from 0.0001 to 0.001 at step 20: there is no intact step-000016, from "
        "before the decay, to resume from; --restart trains all steps on one schedule"
    ) in messages
    assert trainer.fit() == "finished"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_jump_of_the_rate_is_reported_with_both_rates(config, schedule, messages) -> None:
    config = dataclasses.replace(config, schedule=schedule)
    build(config).fit()
    longer = dataclasses.replace(config, max_steps=40)
    trainer = build(longer)
    (notice,) = [line for line in messages if "--max_steps raised" in line]
    trainer.fit()
    rates = {event["step"]: event["lr"] for event in events(longer, "train")}
    if schedule == "constant":
        assert notice.endswith("--max_steps raised from 20 to 40")  # the rate stays as it is
        assert rates[19] == rates[20] == rates[39] == config.max_lr
    else:
        assert f" and jumps from 0.0001 to {rates[20]:.2g} at step 20: a run with " in notice
        assert rates[20] > 3 * rates[19]


def test_fall_of_the_dropout_by_a_longer_ramp_is_reported(wsd, messages) -> None:
    ramp = dataclasses.replace(wsd, dropout=0.2, dropout_ramp=0.5)
    build(ramp).fit()
    build(dataclasses.replace(ramp, max_steps=25)).fit()  # its ramp of 12.5 steps ends before 16
    build(dataclasses.replace(ramp, max_steps=80))
    first, second = [line for line in messages if "--max_steps raised" in line]
    assert "dropout" not in first
    assert second.endswith("; by --dropout_ramp, dropout falls from 0.2 to 0.1 there")


def test_small_change_of_the_rate_is_not_a_jump(config, messages) -> None:
    trainer = build(config)
    trainer.stop_signal = StopAfter(6)  # one step after the warmup
    trainer.fit()
    build(dataclasses.replace(config, max_steps=30))
    assert any(line.endswith("follows the new schedule from here") for line in messages)
