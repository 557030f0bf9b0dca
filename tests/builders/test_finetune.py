"""`--preset finetune`: it learns faster than from scratch, its steps follow the text, and what does
not fit the model is refused."""

import dataclasses
import math
from pathlib import Path

import pytest

from gptforge.builders.build_trainer import build_trainer
from gptforge.builders.resolve import resolve_out_dir
from gptforge.builders.text_presets import EPOCHS, MAX_TOKENS, choose_batch_size, choose_lr
from gptforge.config_file import read_toml
from gptforge.presets import get_preset
from tests.conftest import play_text
from tests.programs import events
from tests.training.runs import build

ROOT = Path(__file__).parents[2]
MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}


def best_val_loss(run: Path) -> float:
    return min(event["val_loss"] for event in events(run) if event["event"] == "eval")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 32 positions on the characters of a play."""
    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "play.txt").write_text(play_text())
    config = dataclasses.replace(
        get_preset("debug"), **MODEL, device="cpu", input=str(folder / "play.txt"),
        out_dir=str(folder / "run"), max_steps=2, warmup_steps=1, sample_every=0,
    )  # fmt: skip
    build(config).fit()
    return folder / "run"


@pytest.fixture
def finetune(pretrained: Path, program, tmp_path: Path):
    """Call the program with the preset, on a text with the play's characters."""
    lines = [f"What light is {i * 5 % 37} in yonder window?\n" for i in range(99)]
    text = tmp_path / "sonnet.txt"
    text.write_text("".join(lines))

    def call(*flags: object, command: str = "train"):
        base = ("--init_from", pretrained, "--input", text, "--out_dir", "tuned")
        return program(command, "--preset", "finetune", "--device", "cpu", *base, *flags)

    return call


def test_a_tenth_of_the_steps_beats_training_from_scratch(tmp_path: Path) -> None:
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "book.txt").write_text(text[1_000_000:1_200_000])
    (tmp_path / "other.txt").write_text(text[2_000_000:2_020_000])
    small = dataclasses.replace(
        get_preset("debug"), **MODEL, device="cpu", input=str(tmp_path / "book.txt"),
        out_dir=str(tmp_path / "pretrained"), max_steps=200, max_lr=3e-3, eval_every=100,
        save_every=200, sample_every=0, log_every=50, batch_size=16,
        gradient_accumulation_steps=1,
    )  # fmt: skip
    build(small).fit()
    scratch = dataclasses.replace(
        small, input=str(tmp_path / "other.txt"), out_dir=str(tmp_path / "scratch"), max_steps=100
    )
    build(scratch).fit()
    tuned = dataclasses.replace(
        get_preset("finetune"), device="cpu", dtype="float32", init_from=small.out_dir,
        input=scratch.input, out_dir=str(tmp_path / "tuned"), max_steps=10,
    )  # fmt: skip
    trainer = build_trainer(tuned, explicit=("max_steps",))
    assert trainer is not None
    trainer.fit()
    assert best_val_loss(tmp_path / "tuned") < best_val_loss(tmp_path / "scratch")


def test_steps_follow_the_text(pretrained: Path, tmp_path: Path) -> None:
    steps = []
    for length in (1, 2, 40):
        text = tmp_path / f"{length}.txt"
        text.write_text("What light is 1 in yonder window?\n" * 120 * length)
        config = dataclasses.replace(
            get_preset("finetune"), device="cpu", init_from=str(pretrained), input=str(text),
            out_dir=str(tmp_path / f"run-{length}"),
        )  # fmt: skip
        trainer = build_trainer(config, explicit=())
        assert trainer is not None and trainer.lock is not None
        trainer.lock.release()
        found = trainer.config
        epoch = math.ceil(trainer.dataloader.num_sequences / found.global_batch_size)
        assert found.max_steps == EPOCHS * epoch
        assert found.warmup_steps == max(1, found.max_steps // 20)
        assert found.min_lr == found.max_lr / 10
        assert found.eval_every * found.patience <= epoch == found.save_every
        assert found.patience == 5
        steps.append(found.max_steps)
    assert steps[1] == pytest.approx(2 * steps[0], rel=0.1)
    assert steps[2] >= EPOCHS * 100  # larger batches, but enough steps


def test_model_is_taken_from_init_from_and_explicit_flags_are_kept(finetune) -> None:
    flags = (
        "--max_lr",
        5e-6,
        "--batch_size",
        2,
        "--max_steps",
        6,
        "--dropout",
        0,
        "--val_fraction",
        0,
    )
    assert finetune(*flags).code == 0
    run, _ = read_toml(Path("tuned/config.toml"))
    assert {name: run[name] for name in MODEL} == MODEL
    assert (run["max_lr"], run["min_lr"]) == (5e-6, pytest.approx(5e-7))
    assert (run["batch_size"], run["max_steps"], run["dropout"]) == (2, 6, 0)
    assert run["patience"] == 0  # nothing is held out


def test_a_run_resumes_with_its_own_recipe(finetune) -> None:
    assert finetune("--max_lr", 2e-4, "--max_steps", 4).code == 0
    done = finetune("--max_steps", 6)
    assert (done.code, "Resuming from step-000004" in done.out) == (0, True), done.err
    run, _ = read_toml(Path("tuned/config.toml"))
    assert (run["max_lr"], run["max_steps"]) == (2e-4, 6)


def test_fewer_steps_than_the_warmup_of_a_run_are_no_error(finetune) -> None:
    assert finetune("--max_steps", 40).code == 0
    done = finetune("--max_steps", 1)
    assert (done.code, "it keeps 40" in done.out) == (0, True), done.err


def test_config_of_a_run_is_taken_as_it_is(finetune, program) -> None:
    assert finetune("--max_lr", 2e-4, "--max_steps", 4).code == 0
    done = program("--config", "tuned/config.toml", "--out_dir", "again")
    assert done.code == 0, done.err
    first, _ = read_toml(Path("tuned/config.toml"))
    again, _ = read_toml(Path("again/config.toml"))
    assert {**again, "out_dir": "tuned"} == first


def test_config_of_a_run_with_another_model_imports_it(finetune, program) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert finetune("--max_steps", 4).code == 0
    assert program("export", "tuned", "--to", "hf", "model").code == 0
    flags = ("--config", "tuned/config.toml", "--init_from", "model", "--out_dir", "again")
    done = program(*flags)
    assert done.code == 0, done.err
    again, _ = read_toml(Path("again/config.toml"))
    assert again["init_from"] == "runs/imported/model"
    assert again["max_steps"] == 4


def test_without_a_model_is_an_error(program, play) -> None:
    for command in ("train", "plan"):
        done = program(command, "--preset", "finetune", "--input", play)
        assert done.code == 2
        assert done.err.startswith("error: --preset finetune needs --init_from: ")
        assert done.err.count("\n") == 1


def test_longer_context_than_the_models_is_refused(finetune) -> None:
    for command in ("train", "plan"):
        done = finetune("--context_length", 64, command=command)
        assert done.code == 2
        assert "error: --context_length 64 is more than the 32 positions of the model" in done.err
        assert "give 32 or less" in done.err


def test_shorter_context_uses_the_first_positions(finetune) -> None:
    done = finetune("--context_length", 16, "--max_steps", 2)
    assert done.code == 0, done.err
    run, _ = read_toml(Path("tuned/config.toml"))
    assert (run["context_length"], run["block_size"]) == (16, 32)


@pytest.mark.parametrize("name", ["gpt2", "char", "bpe"])
def test_another_vocabulary_is_refused(finetune, name) -> None:
    done = finetune("--tokenizer", name)
    assert done.code == 2
    assert f"error: --tokenizer {name} " in done.err
    assert "leave --tokenizer out" in done.err
    assert done.err.count("\n") == 1


def test_plan_shows_the_steps_that_training_makes(finetune) -> None:
    plan = finetune(command="plan")
    assert plan.code == 0, plan.err
    assert "3.0 epochs" in plan.out
    assert finetune().code == 0
    run, _ = read_toml(Path("tuned/config.toml"))
    assert f"run         {run['max_steps']} steps" in plan.out


def test_batches_grow_with_the_text_within_bounds() -> None:
    sizes = [choose_batch_size(sequences, 1024) for sequences in (1, 399, 800, 1599, 3200, 10**6)]
    assert sizes == [4, 4, 8, 8, 32, 32]
    assert choose_batch_size(10**6, 256) * 256 == MAX_TOKENS
    assert choose_batch_size(10**6, 2**20) == 4


def test_run_folder_is_named_after_the_text() -> None:
    config = dataclasses.replace(get_preset("finetune"), input="texts/book.txt")
    assert resolve_out_dir(config) == "runs/book-finetune"


def test_learning_rate_falls_with_the_width() -> None:
    assert choose_lr(768) == 1e-4
    assert choose_lr(1600) == pytest.approx(4.8e-5)
    assert choose_lr(16) == 1e-3
