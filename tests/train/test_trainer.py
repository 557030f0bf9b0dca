"""Whole runs of a tiny model, in this process."""

import dataclasses
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from gptforge.build import build_trainer
from gptforge.build.step import estimate
from gptforge.checkpoint.store import CheckpointStore, read_state, read_tensors, read_tokenizer
from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.train.guards import StopGuard
from gptforge.train.step import TrainStep
from tests.train.runs import StopAfter, build, events, last


def test_a_run_makes_exactly_max_steps_updates(config) -> None:
    trainer = build(config)
    assert trainer.run() == "finished"
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    assert trainer.loader.position == 20 * config.global_batch
    steps = {float(s["step"]) for s in trainer.train_step.optimizer.state.values()}
    assert steps == {20.0}
    assert last(config).name == "step-000020"
    assert events(config, "end")[0]["reason"] == "finished"


def test_what_is_said_to_be_compiled_stays_compiled(config, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    said: list[str] = []
    config = dataclasses.replace(config, compile="true", dropout=0.0)
    trainer = build_trainer(config, given=(), say=said.append)
    assert trainer is not None
    assert "torch.compile: on, as asked" in said
    assert trainer.train_step.is_compiled


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
    build(straight).run()

    first = build(config)
    first.guard = StopAfter(8)
    assert first.run() == "interrupted"
    assert last(config).name == "step-000008"
    torch.manual_seed(99)  # a new process has other dice
    assert build(config).run() == "finished"

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
    first.guard = StopAfter(9)
    first.run()
    # As if the process had died two steps behind the checkpoint, with its lines written.
    with (Path(config.out_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 9, "loss": 1}\n{"event": "train", "st')
    build(config).run()
    assert [event["step"] for event in events(config, "train")] == list(range(20))
    log = (Path(config.out_dir) / "log.md").read_text()
    assert log.count("\nstep 9 |") == 1


def test_another_micro_batch_goes_on_with_the_same_data(config) -> None:
    first = build(config)
    first.guard = StopAfter(8)
    first.run()
    other = dataclasses.replace(config, batch_size=2, gradient_accumulation_steps=4)
    trainer = build(other)
    assert trainer.loader.position == 8 * config.global_batch
    assert trainer.run() == "finished"


def test_best_is_the_lowest_held_out_loss_and_never_gets_worse(config) -> None:
    trainer = build(dataclasses.replace(config, max_steps=40, max_lr=0.05))
    trainer.run()
    losses = {event["step"]: event["val_loss"] for event in events(config, "eval")}
    assert set(losses) == set(range(4, 41, 4))
    best = min(losses, key=lambda step: losses[step])
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    assert store.pointed("best").name == f"step-{best:06d}"
    assert trainer.progress.best_loss == losses[best]
    so_far = math.inf
    for event in [e for e in events(config, "save") if e["best"]]:
        assert losses[event["step"]] < so_far
        so_far = losses[event["step"]]


def test_with_nothing_held_out_best_goes_by_the_mean_training_loss(config) -> None:
    config = dataclasses.replace(config, val_fraction=0.0)
    trainer = build(config)
    trainer.run()
    assert events(config, "eval") == []
    losses = [event["loss"] for event in events(config, "train")]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, 20, 4)]
    assert trainer.progress.best_loss == pytest.approx(min(means), rel=1e-5)
    assert trainer.progress.best_step == 4 * (means.index(min(means)) + 1)


def test_the_last_step_is_logged_whatever_the_cadence(config) -> None:
    config = dataclasses.replace(config, log_every=7, eval_every=100)
    build(config).run()
    assert [event["step"] for event in events(config, "train")] == [0, 7, 14, 19]
    assert [event["step"] for event in events(config, "eval")] == [20]


def test_a_finished_run_is_left_alone_and_more_steps_go_on(config) -> None:
    build(config).run()
    said: list[str] = []
    assert build_trainer(config, given=(), say=said.append) is None
    assert "is finished" in said[-1]
    longer = dataclasses.replace(config, max_steps=30)
    trainer = build_trainer(longer, given=(), say=said.append)
    assert any("follows the new schedule" in line for line in said)
    trainer.run()
    assert [event["step"] for event in events(config, "train")] == list(range(30))


def test_another_configuration_is_refused_by_name(config) -> None:
    build(config).run()
    for change in ({"n_layer": 3}, {"max_lr": 0.5}, {"batch_size": 5}, {"seed": 3}):
        with pytest.raises(UserError, match=next(iter(change))):
            build(dataclasses.replace(config, **change))


def test_another_text_is_refused(config, play) -> None:
    build(config).run()
    play.write_text(play.read_text().replace("light", "night"))
    with pytest.raises(UserError, match="the text is not the one"):
        build(dataclasses.replace(config, max_steps=30))


def test_overwriting_moves_the_old_run_aside(config) -> None:
    build(config).run()
    build(dataclasses.replace(config, overwrite=True, n_layer=1)).run()
    aside = Path(config.out_dir + ".old-1")
    assert (aside / "checkpoints" / "last" / "manifest.json").exists() or (
        aside / "checkpoints" / "last"
    ).is_file()
    assert (Path(config.out_dir) / "log.md").is_file()


def test_a_folder_with_other_things_is_not_trained_into(config) -> None:
    Path(config.out_dir).mkdir()
    (Path(config.out_dir) / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        build(config)
    assert (Path(config.out_dir) / "thesis.txt").read_text() == "years of work"


def test_stopping_before_the_first_step_leaves_no_folder_in_the_way(config, monkeypatch) -> None:
    def interrupt(*_: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "rehearse", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    assert not Path(config.out_dir).exists()
    assert build(config).run() == "finished"


def test_what_a_failed_start_left_is_not_taken_for_somebody_elses(config) -> None:
    # A disk that was full from the first byte on once left a folder that no start would touch.
    for name in ("checkpoints", "log.md", ".config.partial.toml"):
        path = Path(config.out_dir) / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "checkpoints" else path.write_text("half")
    assert build(config).run() == "finished"
    assert "half" not in (Path(config.out_dir) / "log.md").read_text()


def test_a_run_that_never_saved_starts_over(config) -> None:
    build(config)
    assert not (Path(config.out_dir) / "checkpoints" / "last").exists()
    trainer = build(dataclasses.replace(config, max_lr=0.02))
    trainer.run()
    assert len(events(config, "start")) == 1


def test_a_damaged_last_checkpoint_costs_only_the_steps_behind_it(config) -> None:
    build(config).run()
    (last(config) / "optimizer.safetensors").write_bytes(b"broken")
    said: list[str] = []
    trainer = build_trainer(config, given=(), say=said.append)
    assert any("step-000020 is damaged" in line for line in said)
    assert trainer.progress.step == 18
    assert trainer.run() == "finished"


def test_pointers_that_a_crash_left_behind_are_mended(config) -> None:
    build(config).run()
    store = CheckpointStore(Path(config.out_dir) / "checkpoints")
    right = store.pointed("best"), store.pointed("last")
    store.point("best", "step-000006")
    store.point("last", "step-000006")
    assert build_trainer(config, given=(), say=lambda _: None) is None
    assert (store.pointed("best"), store.pointed("last")) == right


def test_a_run_whose_checkpoints_are_gone_is_not_started_over_in_silence(config) -> None:
    build(config).run()
    log = (Path(config.out_dir) / "log.md").read_bytes()
    for path in CheckpointStore(Path(config.out_dir) / "checkpoints").steps():
        (path / "model.safetensors").write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UserError, match="--overwrite"):
            build(config)
    shutil.rmtree(Path(config.out_dir) / "checkpoints")
    with pytest.raises(UserError, match="--overwrite"):
        build(config)
    assert (Path(config.out_dir) / "log.md").read_bytes() == log


def test_a_start_that_fails_has_not_moved_the_old_run(config, tmp_path) -> None:
    build(config).run()
    wrong = dataclasses.replace(config, overwrite=True, init_from=config.out_dir, n_embd=64)
    with pytest.raises(UserError):
        build_trainer(wrong, given={"n_embd"}, say=lambda _: None)
    assert (Path(config.out_dir) / "log.md").is_file()
    assert not Path(f"{config.out_dir}.old-1").exists()
    # Starting from the very run that is moved aside works: its weights are read first.
    again = dataclasses.replace(config, overwrite=True, init_from=config.out_dir)
    assert build(again).run() == "finished"


def test_a_run_begun_from_another_goes_on_when_that_one_has_moved(config, tmp_path) -> None:
    build(config).run()
    other = dataclasses.replace(config, init_from=config.out_dir, out_dir=str(tmp_path / "two"))
    first = build(other)
    first.guard = StopAfter(8)
    first.run()
    Path(config.out_dir).rename(tmp_path / "elsewhere")
    assert build(other).run() == "finished"


def test_an_end_that_a_crash_prevented_is_made_up_for(config) -> None:
    build(config).run()
    metrics = Path(config.out_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"end"' not in line))
    assert build(config).run() == "finished"
    assert len(events(config, "end")) == 1
    assert build_trainer(config, given=(), say=lambda _: None) is None


def test_saves_stay_in_the_events_when_a_run_goes_on(config) -> None:
    first = build(config)
    first.guard = StopAfter(8)
    first.run()
    build(config).run()
    steps = [event["step"] for event in events(config, "save")]
    assert 8 in steps
    assert steps == sorted(set(steps))


def test_weights_of_another_run_are_a_start(config, tmp_path) -> None:
    build(config).run()
    other = Config(
        init_from=config.out_dir, input=config.input, out_dir=str(tmp_path / "two"), device="cpu",
        dtype="float32", context_length=32, batch_size=4, warmup_steps=1, max_steps=2,
    )  # fmt: skip
    trainer = build(other)
    assert trainer.config.n_embd == config.n_embd
    assert trainer.tokenizer.to_json() == read_tokenizer(last(config)).to_json()
    best = CheckpointStore(Path(config.out_dir) / "checkpoints").pointed("best")
    source = read_tensors(best, "model.safetensors")
    weight = trainer.train_step.model.transformer["wpe"].weight
    assert torch.equal(weight, source["transformer.wpe.weight"])
    assert trainer.progress.step == 0
    with pytest.raises(UserError, match=r"--n_embd 64, but .* has 32: leave --n_embd out"):
        build_trainer(
            dataclasses.replace(other, n_embd=64, out_dir=str(tmp_path / "three")),
            given={"n_embd"},  say=lambda _: None,
        )  # fmt: skip


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


def test_what_long_evaluations_take_is_told_beforehand(config, monkeypatch) -> None:
    monkeypatch.setattr(TrainStep, "rehearse", lambda *_: 8.0)
    config = dataclasses.replace(config, eval_every=5, max_steps=20)
    trainer = build(config)
    trainer.lock.close()
    told = estimate(trainer.train_step, config, steps=20, judged=10**6)
    assert "judging it 4 times by 1,000,000 held-out tokens about" in told
    assert "judging" not in estimate(trainer.train_step, config, steps=20, judged=10)


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
