"""`--preset auto` from the command line to the run folder, and back when it resumes."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from gptforge import recipe
from gptforge.builders import step_timing, text_presets
from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import read_config
from gptforge.cli.parsing import parse_train_args, resolve_preset
from gptforge.config import Config
from gptforge.data.prepare.pipeline import prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.presets import get_preset
from gptforge.training.trainer import Trainer
from tests.training.runs import StopAfter, events, last

AUTO = ("--preset", "auto", "--device", "cpu")
TINY = {"n_layer": 1, "n_embd": 16, "max_steps": 12}
OTHER_ANCHORS = {
    name: tuple(dataclasses.replace(a, n_layer=2, max_lr=5e-4, dropout=0.4) for a in anchors)
    for name, anchors in recipe.ANCHORS.items()
}


@pytest.fixture
def config(play, tmp_path, monkeypatch) -> Config:
    """A small run whose remaining fields the rule chooses."""
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(get_preset("auto"), input="play.txt", device="cpu", **TINY)


def build(config: Config, *more: str):
    trainer = build_trainer(config, explicit=[*TINY, *more])
    assert isinstance(trainer, Trainer)
    return trainer


def losses(config: Config) -> list[float]:
    return [event["loss"] for event in events(config, "train")]


def test_chosen_values_are_stored_with_the_run(config, messages) -> None:
    trainer = build(config)
    assert trainer.config.out_dir == "runs/play-auto"
    assert trainer.fit() == "finished"
    stored = read_config(last(trainer.config))
    chosen = recipe.make_recipe(6228, "cpu", explicit=TINY).values
    assert stored.tokenizer == chosen["tokenizer"] == "char"
    for name in ("n_head", "context_length", "max_lr", "weight_decay", "ema", "batch_size"):
        assert getattr(stored, name) == chosen[name], name
    assert any("6.23 KB of text to train on, CPU" in line for line in messages)
    assert any("explicit: max_steps 12, n_embd 16, n_layer 1" in line for line in messages)


@pytest.mark.parametrize("has_link", [True, False], ids=["", "without the link last"])
def test_resumed_run_does_not_depend_on_the_rule(config, monkeypatch, has_link) -> None:
    straight = dataclasses.replace(config, out_dir="straight", save_every=100)
    build(straight, "out_dir").fit()
    trainer = build(config)
    trainer.stop_signal = StopAfter(7)
    assert trainer.fit() == "interrupted"
    if not has_link:  # as in a copy of the run
        Path(trainer.config.out_dir, "checkpoints", "last").unlink()
    monkeypatch.setattr(recipe, "ANCHORS", OTHER_ANCHORS)
    resumed = build(config)
    assert resumed.config.dropout != 0.4
    assert resumed.fit() == "finished"
    assert losses(resumed.config) == losses(straight)


def test_a_run_stopped_in_a_teacher_does_not_depend_on_the_rule(config, monkeypatch) -> None:
    flags = {"teachers": 1, "teacher_steps": 6}
    config = dataclasses.replace(config, **flags)
    fit = Trainer.fit

    def stop(trainer: Trainer) -> object:
        trainer.stop_signal = StopAfter(3)
        return fit(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop)
        assert build_trainer(config, explicit=[*TINY, *flags]) == "interrupted"
    monkeypatch.setattr(recipe, "ANCHORS", OTHER_ANCHORS)
    student = build(config, *flags)
    assert (student.config.dropout, student.config.max_lr) != (0.4, 5e-4)
    assert student.fit() == "finished"


def test_steps_that_fit_a_time_limit_hold_when_a_stopped_teacher_resumes(
    config, monkeypatch
) -> None:
    # Minutes, of which the start takes some even on a busy machine.
    config = dataclasses.replace(config, time_limit=200.0, teachers=2)
    explicit = ["n_layer", "n_embd", "teachers"]
    fit, trained = Trainer.fit, []

    def stop(trainer: Trainer) -> object:
        trained.append(trainer.config.max_steps)
        trainer.stop_signal = StopAfter(3)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", stop)
    for seconds in (2.0, 40.0):  # slower when it resumes
        timing = seconds, "faked"
        monkeypatch.setattr(step_timing, "time_step", lambda *_, t=timing, **__: t)
        assert build_trainer(config, explicit=explicit) == "interrupted"
    first, second = trained
    student = read_config(Path("runs/play-auto"), with_model=False)
    assert first == second == student.teacher_steps
    assert 10 < student.max_steps < 1000


@pytest.mark.parametrize("teacher_steps", [None, 30])
def test_teachers_and_all_evaluations_end_within_a_time_limit(
    config, monkeypatch, teacher_steps
) -> None:
    limit, per_sequence = 6000, 3.0  # seconds
    changes = {"time_limit": limit / 60, "teachers": 2, "eval_every": 1}
    changes |= {"teacher_steps": teacher_steps} if teacher_steps else {}
    monkeypatch.setattr(text_presets, "_flops_per_second", lambda *_: 1e15)
    monkeypatch.setattr(step_timing, "time_step", lambda *_, **__: (per_sequence, "faked"))

    def stop(trainer: Trainer) -> object:
        trainer.stop_signal = StopAfter(1)
        return fit(trainer)

    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", stop)
    explicit = ["n_layer", "n_embd", *changes]
    assert build_trainer(dataclasses.replace(config, **changes), explicit=explicit) == "interrupted"
    c = read_config(Path("runs/play-auto"), with_model=False)
    step = per_sequence * c.global_batch_size
    evaluation = step / 3 * 691 / c.tokens_per_step
    teacher = c.teacher_steps * step + evaluation
    seconds = 2 * teacher + c.max_steps * ((1 + 2 / 3) * step + evaluation)
    usable = recipe.USABLE_TIME * limit
    assert 0.95 * usable < seconds < 1.01 * usable  # steps have two digits


def test_config_file_of_a_run_does_not_depend_on_the_rule(program, play, monkeypatch) -> None:
    flags = ("--n_layer", 1, "--n_embd", 16, "--max_steps", 2, "--input", play)
    assert program(*AUTO, *flags, "--out_dir", "a").code == 0
    monkeypatch.setattr(recipe, "ANCHORS", OTHER_ANCHORS)
    assert program("--config", "a/config.toml", "--out_dir", "b").code == 0
    first, second = (read_config(Path(name) / "checkpoints" / "step-000002") for name in "ab")
    assert dataclasses.replace(second, out_dir="a") == first


@pytest.mark.parametrize("preset", ["auto", "shakespeare-cpu"])
def test_config_file_of_a_run_comes_before_a_preset(program, play, preset) -> None:
    flags = ("--preset", "debug", "--device", "cpu", "--max_steps", 2, "--warmup_steps", 1)
    assert program(*flags, "--input", play, "--out_dir", "a").code == 0
    done = program(
        "--config", "a/config.toml", "--preset", preset, "--out_dir", "b", "--dropout", 0.1
    )
    assert (done.code, done.err) == (0, "")
    assert (
        f"--config a/config.toml sets every value, and --preset {preset} changes none" in done.out
    )
    first, second = (read_config(Path(name) / "checkpoints" / "step-000002") for name in "ab")
    changed = {"preset": preset, "out_dir": "b", "dropout": 0.1}
    assert second == dataclasses.replace(first, **changed)


def test_config_file_of_the_user_comes_before_a_preset(program, play) -> None:
    Path("my.toml").write_text("n_layer = 1\nn_embd = 16\nmax_steps = 2\ndropout = 0.25\n")
    done = program(*AUTO, "--config", "my.toml", "--input", play, "--out_dir", "a", "--n_embd", 32)
    assert done.code == 0, done.err
    found = read_config(Path("a/checkpoints/step-000002"))
    assert (found.n_layer, found.n_embd, found.max_steps, found.dropout) == (1, 32, 2, 0.25)
    assert found.ema == recipe.EMA_DECAY


def test_time_limit_cuts_the_steps_of_a_new_run_only(config, monkeypatch) -> None:
    config = dataclasses.replace(config, time_limit=100, max_steps=get_preset("auto").max_steps)
    flags = ["n_layer", "n_embd", "time_limit"]
    monkeypatch.setattr(text_presets, "_flops_per_second", lambda *_: 1e15)
    for seconds, is_new in ((500.0, True), (1.0, False)):
        sequences = recipe.make_recipe(6228, "cpu").values["batch_size"]
        timing = seconds / int(sequences), "faked"
        monkeypatch.setattr(step_timing, "time_step", lambda *_, t=timing, **__: t)
        trainer = build_trainer(config, explicit=flags)
        assert trainer is not None
        # 5,100 of 6,000 seconds, less the start: 8 steps, and at the end an evaluation.
        assert trainer.config.max_steps == 8
        assert trainer.state.step == (0 if is_new else 3)
        trainer.stop_signal = StopAfter(3)
        trainer.fit()


def test_plan_agrees_with_the_run(program, play) -> None:
    done = program("plan", *AUTO, "--input", play, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    chosen = recipe.make_recipe(6228, "cpu").values
    assert found["model"]["n_layer"] == chosen["n_layer"]
    assert found["run"]["steps"] == chosen["max_steps"]
    assert found["step"]["context_length"] == chosen["context_length"]
    assert found["disk"]["out_dir"] == "runs/play-auto"
    assert "auto: about" in done.err


def test_prepared_shards_keep_their_tokenizer(config, tmp_path) -> None:
    prepare(tmp_path / "shards", PrepareRequest(("play.txt",), tokenizer="byte"))
    trainer = build(dataclasses.replace(config, input="shards"))
    assert trainer.tokenizer.name == "byte"
    assert trainer.config.out_dir == "runs/shards-auto"


@pytest.mark.parametrize(
    ("args", "preset"),
    [
        (("--input", "play.txt"), "auto"),
        (("--input", "play.txt", "--device", "cpu"), "shakespeare-cpu"),
        (("--input", "bundled:input.txt"), "gpt2"),
        ((), "gpt2"),
        (("--input", "play.txt", "--init_from", "some/run"), "gpt2"),
        (("--input", "play.txt", "--preset", "debug"), "debug"),
    ],
)
def test_preset_for_a_text_on_a_gpu(play, tmp_path, monkeypatch, args, preset) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_preset(*parse_train_args(args)).preset == preset


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes")
def test_pipe_has_no_size_and_takes_gpt2(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    os.mkfifo("pipe")
    assert resolve_preset(*parse_train_args(["--input", "pipe"])).preset == "gpt2"


def test_run_of_an_earlier_version_resumes_with_its_preset(play, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Path("runs/gpt2").mkdir(parents=True)
    text = 'preset = "gpt2"\ninput = "play.txt"\n[made_by]\n'
    Path("runs/gpt2/config.toml").write_text(text)
    preset_of = lambda *args: resolve_preset(*parse_train_args(args)).preset  # noqa: E731
    assert preset_of("--input", "play.txt") == "gpt2"
    assert preset_of("--input", "other.txt") == "auto"
    assert preset_of("--input", "play.txt", "--restart") == "auto"
    assert preset_of("--input", "play.txt", "--out_dir", "elsewhere") == "auto"


def test_commands_without_a_text_refuse_it(program, play) -> None:
    refused = program("bench", *AUTO)
    assert refused.code == 2
    assert "--preset auto fits a text, and none is read here" in refused.err
    assert program("doctor", play, "--preset", "auto").code == 0
