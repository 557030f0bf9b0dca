"""--init_from: the tokenizer has to be that of the other model."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from gptforge.builders.build_trainer import build_trainer
from gptforge.checkpoint.format import TOKENIZER, read_tokenizer
from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.tokenizers import save
from gptforge.tokenizers.char import CharTokenizer
from tests.programs import DEBUG, events
from tests.training.runs import build, last


@pytest.fixture
def first(config: Config) -> Config:
    """A finished run on the characters of a play."""
    config = dataclasses.replace(config, dropout=0.0, max_steps=8, warmup_steps=2)
    build(config).fit()
    return config


@pytest.fixture
def sonnet(tmp_path: Path) -> Path:
    """A text with fewer characters than the play."""
    path = tmp_path / "sonnet.txt"
    path.write_text("What light in yonder window is?\n" * 60)
    return path


def start(first: Config, tmp_path: Path, sonnet: Path, *flags: object) -> tuple[object, ...]:
    base = ("--init_from", first.out_dir, "--input", sonnet, "--out_dir", tmp_path / "second")
    return (*DEBUG, *base, "--max_steps", 2, *flags)


@pytest.mark.parametrize("name", ["char", "gpt2", "byte", "file"])
def test_other_tokenizer_by_flag_is_refused(first, tmp_path, sonnet, program, name) -> None:
    if name == "file":
        name = "other.json"
        # As many characters as the play has, but another one of them.
        letters = read_tokenizer(last(first)).to_json()["alphabet"]
        save(CharTokenizer(letters[:-1] + "~"), Path(name))
    done = program(*start(first, tmp_path, sonnet, "--tokenizer", name))
    assert done.code == 2
    assert f"error: --tokenizer {name} (" in done.err
    assert f"is not the one of --init_from {first.out_dir} (char, " in done.err
    assert "leave --tokenizer out" in done.err
    assert not (tmp_path / "second").exists()
    # The hint works, and training continues from the other run's loss.
    assert program(*start(first, tmp_path, sonnet)).code == 0
    assert events(tmp_path / "second")[1]["loss"] < 4.2


def test_other_tokenizer_by_config_file_is_refused(first, tmp_path, sonnet, program) -> None:
    Path("settings.toml").write_text('tokenizer = "char"\n')
    done = program(*start(first, tmp_path, sonnet, "--config", "settings.toml"))
    assert (done.code, "is not the one of --init_from" in done.err) == (2, True), done.err


@pytest.mark.parametrize("flags", [(), ("--tokenizer", "gpt2")])
def test_shards_with_another_tokenizer_are_refused(first, tmp_path, sonnet, program, flags) -> None:
    assert program("prepare", sonnet, "--out", "shards", "--tokenizer", "gpt2").code == 0
    done = program(*start(first, tmp_path, Path("shards"), *flags))
    path = (last(first).parent / "best").resolve() / TOKENIZER
    assert done.code == 2
    assert "shards was prepared with " in done.err
    hint = "prepare the text again with --tokenizer "
    tokenizer = done.err.split(hint)[1].strip()
    assert Path(tokenizer).resolve() == path
    # The hint works.
    assert program("prepare", sonnet, "--out", "again", "--tokenizer", tokenizer).code == 0
    assert program(*start(first, tmp_path, Path("again"))).code == 0


def test_plan_refuses_it_with_the_same_message(first, tmp_path, sonnet, program) -> None:
    flags = start(first, tmp_path, sonnet, "--tokenizer", "char")
    assert program("plan", *flags).err == program(*flags).err != ""


def test_same_tokenizer_under_another_name_is_accepted(first, tmp_path, sonnet, program) -> None:
    shutil.copy(last(first) / TOKENIZER, "copy.json")
    assert program(*start(first, tmp_path, sonnet, "--tokenizer", "copy.json")).code == 0
    # A text with the same characters gives the same alphabet.
    again = start(first, tmp_path, Path(first.input), "--tokenizer", "char", "--restart")
    assert program(*again).code == 0


def test_resume_with_the_same_flags(first, tmp_path, sonnet, program) -> None:
    shutil.copy(last(first) / TOKENIZER, "copy.json")
    flags = start(first, tmp_path, sonnet, "--tokenizer", "copy.json")
    assert program(*flags).code == 0
    done = program(*flags[:-4], "--max_steps", 4, "--tokenizer", "copy.json")
    assert (done.code, "Resuming from step-000002" in done.out) == (0, True), done.err


def test_run_started_with_another_tokenizer_by_an_earlier_version_resumes(
    first, tmp_path, monkeypatch
) -> None:
    """Its weights have been trained with that tokenizer since."""
    letters = read_tokenizer(last(first)).to_json()["alphabet"]
    save(CharTokenizer(letters[:-1] + "~"), tmp_path / "other.json")
    Path(first.input).write_text("What light is 7 in the window?\n" * 60)
    second = dataclasses.replace(
        first,
        init_from=first.out_dir,
        tokenizer=str(tmp_path / "other.json"),
        out_dir=str(tmp_path / "second"),
        max_steps=4,
    )
    with monkeypatch.context() as earlier:
        for module in ("resolve", "resolve_run"):
            earlier.setattr(f"gptforge.builders.{module}.check_tokenizer", lambda *_, **__: None)
        trainer = build_trainer(second, explicit=("tokenizer",))
        assert trainer is not None
        trainer.fit()
    longer = dataclasses.replace(second, max_steps=6)
    trainer = build_trainer(longer, explicit=("tokenizer",))
    assert trainer is not None and trainer.state.step == 4
    trainer.lock.release()


def test_eval_refuses_shards_with_another_tokenizer(first, program) -> None:
    assert program("prepare", first.input, "--out", "shards", "--tokenizer", "gpt2").code == 0
    done = program("eval", first.out_dir, "--data", "shards", "--device", "cpu")
    assert done.code == 2
    tokenizer = done.err.split("prepare the text again with --tokenizer ")[1].strip()
    assert program("prepare", first.input, "--out", "same", "--tokenizer", tokenizer).code == 0
    assert program("eval", first.out_dir, "--data", "same", "--device", "cpu").code == 0


def test_gpt2_model_refuses_a_char_tokenizer(tmp_path, play) -> None:
    small = Config(
        preset="", input=str(play), out_dir=str(tmp_path / "gpt2"), device="cpu", n_layer=1,
        n_head=1, n_embd=8, block_size=16, context_length=16, batch_size=2,
        gradient_accumulation_steps=1, max_steps=1, warmup_steps=1, sample_every=0,
    )  # fmt: skip
    build(small).fit()
    other = dataclasses.replace(
        small, init_from=small.out_dir, tokenizer="char", out_dir=str(tmp_path / "two")
    )
    with pytest.raises(UserError, match=r"--tokenizer char \(char, \d+ ids\) is not the one of"):
        build_trainer(other, explicit=("tokenizer",))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "does not exist"),
        ("folder", "is not the folder of a run"),
        ("begun", "has no checkpoint yet"),
        ("sonnet.txt", "not nanoGPT's ckpt.pt"),
    ],
)
def test_what_is_no_model_is_refused_with_the_flag(program, sonnet, name, problem) -> None:
    Path("folder").mkdir()
    Path("begun").mkdir()
    Path("begun/config.toml").write_text("")
    done = program(*DEBUG, "--input", sonnet, "--init_from", name)
    assert done.code == 2
    assert done.err.startswith(f"error: --init_from {name}") and problem in done.err
