"""Names of run folders, `--resume RUN`, and what training prints."""

import json
import signal
from pathlib import Path

import pytest

from gptforge.builders.resolve import resolve_out_dir
from gptforge.checkpoint.format import read_config
from gptforge.config import Config
from gptforge.training.trainer import Trainer
from tests.conftest import play_text
from tests.programs import DEBUG, events

SHORT = (*DEBUG, "--max_steps", 4, "--sample_every", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "runs/debug"),
        ("bundled:input.txt", "runs/debug"),
        ("some where/my book.v2.txt", "runs/my-book.v2-debug"),
        ("notes/", "runs/notes-debug"),
        (".", "runs/debug"),
    ],
)
def test_run_folder_is_named_after_text_and_preset(tmp_path, monkeypatch, text, expected) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_out_dir(Config(preset="debug", input=text)) == expected


def test_texts_have_their_own_folders(program, play) -> None:
    play.with_name("other.txt").write_text(play_text()[::-1])
    for name in ("play.txt", "other.txt"):
        assert program(*SHORT, "--input", name).code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["other-debug", "play-debug"]
    Path("folder").mkdir()
    Path("folder/play.txt").write_text(play_text().replace("light", "night"))
    refused = program(*SHORT, "--input", "folder/play.txt")
    assert (refused.code, "input: not the text that" in refused.err) == (2, True)


def test_run_of_an_earlier_version_is_found_by_the_same_command(program, play) -> None:
    assert program(*SHORT, "--input", "play.txt").code == 0
    Path("runs/play-debug").rename("runs/debug")
    for name in ("play.txt", play):
        done = program(*SHORT, "--input", name)
        assert (done.code, "runs/debug is finished" in done.out) == (0, True), done.err
    play.with_name("other.txt").write_text(play_text())
    assert program(*SHORT, "--input", "other.txt").code == 0
    assert Path("runs/other-debug/config.toml").is_file()


def test_a_run_that_is_stopped_in_a_teacher_is_listed_and_resumes(
    program, play, monkeypatch
) -> None:
    train_step = Trainer.train_step

    def interrupt(trainer: Trainer) -> object:
        assert trainer.report.is_teacher
        signal.raise_signal(signal.SIGINT)
        return train_step(trainer)

    flags = ("--teachers", 1, "--teacher_steps", 3, "--dropout", 0.2, "--out_dir", "runs/a b")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupt)
        stopped = program(*SHORT, *flags, "--input", play)
    assert (stopped.code, "--resume 'runs/a b'" in stopped.out) == (130, True), stopped.err
    [row] = json.loads(program("runs", "--json").out)
    assert (row["run"], row["state"], row["step"]) == ("runs/a b", "unfinished", 0)
    done = program("--resume", "runs/a b")
    assert (done.code, "teacher 1 of 1" in done.out) == (0, True), done.err
    assert events(Path("runs/a b"))[-1]["step"] == 4
    config = read_config(Path("runs/a b"), with_model=False)
    assert (config.teachers, config.dropout) == (1, 0.2)


@pytest.mark.parametrize("name", ["run", "run/checkpoints/last", "run/checkpoints/step-000004"])
def test_resume_needs_no_other_flag(program, play, name) -> None:
    flags = ("--seed", 3, "--input", "play.txt", "--out_dir", "run")
    assert program(*SHORT, *flags).code == 0
    done = program("--resume", name)
    assert (done.code, "run is finished: 4 steps are done" in done.out) == (0, True), done.err
    # In another place, and with a flag that may change.
    Path("run").rename("moved")
    done = program("--resume", name.replace("run", "moved"), "--max_steps", 6)
    assert (done.code, done.err) == (0, "")
    assert [e["step"] for e in events(Path("moved")) if e["event"] == "train"] == list(range(6))
    assert not Path("run").exists()


def test_resume_refuses_what_contradicts_the_run(program, run) -> None:
    for flags, words in (
        (("--n_layer", 3), "n_layer: 2 -> 3"),
        (("--out_dir", "b"), "leave --out_dir out; a copy of the run's folder resumes, too"),
        (("--overwrite",), "--resume run and --restart contradict each other: leave one out"),
    ):
        done = program("--resume", "run", *flags)
        assert (done.code, words in done.err) == (2, True), done.err
    Path("empty").mkdir()
    assert program("export", run, "--to", "hf", "out").code == 0
    for name in ("empty", "out", "nowhere/run"):
        done = program("--resume", name)
        assert done.code == 2
        assert f"--resume {name}: there is no run" in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "conflict"),
    [
        (("--tokenizer", "byte"), "tokenizer: not the one that the run was started with"),
        (("--tokenizer", "bpe"), "tokenizer: not the one that the run was started with"),
        (("--field", "other"), "field: not the text that run was trained on"),
    ],
)
def test_resume_blames_the_flag_that_was_given(program, tmp_path, flags, conflict) -> None:
    lines = [{"text": line, "other": line[::-1]} for line in play_text().splitlines() if line]
    Path("play.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert program(*SHORT, "--input", "play.jsonl", "--out_dir", "run").code == 0
    done = program("--resume", "run", *flags)
    message = f"another configuration ({conflict}): leave these flags out to resume it"
    assert (done.code, message in done.err) == (2, True), done.err


def test_a_refused_resume_says_what_can_be_done_with_resume(program, play) -> None:
    assert program(*SHORT, "--input", play, "--out_dir", "run").code == 0
    done = program("--resume", "run", "--n_layer", 3)
    assert "(n_layer: 2 -> 3): leave these flags out to resume it, or start a new run" in done.err
    for flag in ("--batch_size", "--gradient_accumulation_steps"):
        done = program("--resume", "run", flag, 16)
        assert "gradient_accumulation_steps: 8 -> " in done.err
        assert "leave these flags out to resume it" in done.err
    play.write_text(play_text() + "more")
    done = program("--resume", "run")
    assert "restore the text to resume it, or start a new run without --resume" in done.err
    # The command that started the run may well get another folder.
    done = program(*SHORT, "--input", play, "--out_dir", "run")
    assert "choose another --out_dir, or --restart to move it to a backup" in done.err


def test_quiet_and_verbose(program, play) -> None:
    flags = (*SHORT, "--input", play, "--save_every", 2, "--restart")
    quiet, usual, verbose = (program(*flags, *more) for more in (["--quiet"], [], ["--verbose"]))
    assert [done.code for done in (quiet, usual, verbose)] == [0, 0, 0]
    lines = quiet.out.strip().splitlines()
    assert lines[0].startswith("Best held-out loss") and lines[-1].startswith("Report: ")
    assert "step 3 | loss" in usual.out
    assert "saved step-000002" not in usual.out
    assert "saved step-000002" in verbose.out and "step 3 | loss" in verbose.out
    finished = program(*flags[:-1], "--quiet").out
    assert finished.startswith("runs/play-debug is finished") and finished.count("\n") == 1


@pytest.mark.parametrize("teachers", [0, 1])
def test_json_log_is_the_metrics(program, play, teachers) -> None:
    flags = ("--teachers", teachers, "--log_format", "json", "--out_dir", "run")
    done = program(*SHORT, "--input", play, *flags)
    assert done.code == 0
    assert [json.loads(line) for line in done.out.splitlines()] == events()
    assert done.err.strip().startswith("Best held-out loss")


def test_a_run_whose_text_or_configuration_is_lost_says_how_to_resume(program, play) -> None:
    assert program(*SHORT, "--input", play, "--out_dir", "run", "--max_steps", 2).code == 0
    moved = play.rename(play.with_name("moved.txt"))
    lost = program("--resume", "run", "--max_steps", 3)
    assert lost.code == 2 and "the text of the run, is not here" in lost.err
    assert program("--resume", "run", "--max_steps", 3, "--input", moved).code == 0
    for damage in (lambda path: path.write_text("[[["), Path.unlink):
        damage(Path("run/config.toml"))
        refused = program("--resume", "run")
        assert refused.code == 2 and "the command that started the run resumes it" in refused.err
    done = program(*SHORT, "--input", moved, "--out_dir", "run", "--max_steps", 4)
    assert done.code == 0 and "step 3 |" in done.out
