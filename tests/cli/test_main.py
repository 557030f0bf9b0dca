"""The command line: errors, exit codes, help, and the processes of torchrun."""

import errno
import os
import re
import sys

import pytest

from gptforge import __version__, cli
from gptforge.cli import train
from gptforge.cli.parsing import RENAMED_FLAGS
from gptforge.config import FIELDS, FOREIGN_FIELDS
from gptforge.errors import UserError


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--max_stps", "3"), "did you mean --max_steps?"),
        (("--max_steps", "many"), "--max_steps must be a whole number, not 'many'"),
        (("--max_lr", "high"), "--max_lr must be a number, not 'high'"),
        (("bench", "--repeats", "1.5"), "a whole number, not '1.5' (see gptforge bench --help)"),
        (("bench", "--turns", "0"), "--repeats must be 1 or more"),
        (("sweep", "--max_lr", "1e-3,2e-3"), "several values: --grid max_lr=1e-3,2e-3"),
        (("--max_steps",), "--max_steps"),
        (("--shuffle", "maybe"), "must be true or false"),
        (("--dtype", "int8"), "--dtype"),
        (("--preset", "gpt5"), "gpt2-medium"),
        (("--config", "missing.toml"), "no such file"),
        (("--n_embd", "100", "--n_head", "12"), "--n_embd 100"),
        (("--warmup_steps", "600"), "--warmup_steps 600"),
        (("--input", "missing.txt"), "missing.txt"),
        (("--device", "tpu"), "--device tpu"),
        (("--vocab_size", "10"), "--vocab_size 10"),
        (("--context_length", "9999", "--block_size", "9999"), "--context_length 9999"),
        (("--init_from", "missing"), "missing"),
        (("--tokenizer", "bert"), "--tokenizer bert"),
        (("--out_dir", ".", "--restart"), "--out_dir ."),
        (("--out_dir", "play.txt/run"), "--out_dir play.txt/run"),
        (("--out_dir", "caf\udce9"), "UTF-8"),
        (("--batch_size", 10**12), "--batch_size 1000000000000"),
        (("--quiet", "--verbose"), "leave one out"),
        (("--resume=",), "--resume needs a run; there is none in runs"),
        (("--resume", "--seed", 3), "--resume needs a value"),
        (("trian",), "did you mean 'train'?"),
        (("play.txt",), "--input play.txt"),
        (("--learning_rate", "1e-3"), "did you mean --max_lr?"),
        (("version",), "did you mean '--version'?"),
        (("sample",), "gptforge sample needs RUN; there is none in runs: train one first (see"),
        (("export",), "gptforge export needs RUN and OUT and --to; there is"),
        (("export", "r", "--to", "hf", "--out", "o"), "gptforge export takes OUT without a flag"),
        (
            ("export", "r", "out", "--format", "hf"),
            "Unrecognized options: --format; gptforge export needs --to (see",
        ),
        (("sample", "r", "--prompt"), "--prompt needs a value"),
        (("sample", "r", "--max_tokens", 9), "did you mean --max_new_tokens?"),
        (("eval", "r", "--input", "a.txt"), "did you mean --data?"),
        (("sample", "--prmpt", "x", "r"), "Unrecognized options: --prmpt; did you mean --prompt?"),
        (("prepare", "play.txt"), "gptforge prepare needs --out (see gptforge prepare --help)"),
        (("prepare", "x", "--out", "y", "--vocab_size", 300), "is for --tokenizer bpe"),
        (("sample", "missing"), "missing"),
        (("eval", "missing"), "missing"),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(program, play, args, words) -> None:
    flags = ("--input", play, "--preset", "debug", "--device", "cpu")
    done = program(*(flags if args[0].startswith("--") else ()), *args)
    assert done.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", done.err)
    assert words in done.err


def test_help_is_named_as_the_program_was_started(program, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    assert "(see python gpt.py --help)" in program("--max_stps", "3").err
    assert "python gpt.py sample needs RUN" in program("sample").err


def test_runs_are_listed_if_one_is_missing(program, tmp_path) -> None:
    for number, name in enumerate("abcde"):
        folder = tmp_path / "runs" / name / "checkpoints"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    for command in (("sample",), ("eval", "nowhere"), ("export", "nowhere", "out", "--to", "hf")):
        assert "; there are runs/e, runs/d, runs/c and 2 more" in program(*command).err


def test_run_instead_of_a_command_gets_the_commands_for_it(program, tmp_path) -> None:
    (tmp_path / "runs/mine/checkpoints").mkdir(parents=True)
    done = program("runs/mine")
    assert "sample runs/mine, to train it further: --resume runs/mine" in done.err


def test_suggested_flags_exist() -> None:
    assert set(FOREIGN_FIELDS.values()) <= set(FIELDS)
    assert not set(FOREIGN_FIELDS) & (set(FIELDS) | set(RENAMED_FLAGS))


def test_debug_mode_shows_the_traceback(program, monkeypatch) -> None:
    monkeypatch.setenv("GPTFORGE_DEBUG", "1")
    with pytest.raises(UserError):
        program("--max_stps", "3")


def test_a_full_disk_is_one_line_with_the_file(program, monkeypatch) -> None:
    def fail(args) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/index.json")

    monkeypatch.setitem(cli.COMMANDS, "prepare", (fail, object, ""))
    done = program("prepare")
    assert done.code == 1
    assert done.err == (
        "error: out/index.json: the disk is full: free some space, then run the same command "
        "again\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="others may keep or lock the folder")
def test_a_deleted_working_folder_is_one_line(program, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    outcome = program("--preset", "debug")
    assert outcome.code == 2
    assert "the working folder was deleted" in outcome.err


def test_help_shows_all_fields_and_commands(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code in (0, None)
    shown = capsys.readouterr().out
    for name in FIELDS:
        assert f"--{name}" in shown
    for name, (_, _, about) in cli.COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(about)}", shown)
    assert "gptforge --version" in shown and 'eval "$(gptforge completion bash)"' in shown


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gptforge {__version__}\n"


def test_help_ends_in_a_terminal_of_one_column(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit):
        cli.main(["cache", "--help"])
    assert "--clear" in capsys.readouterr().out


def test_help_breaks_lines_at_the_width_of_the_terminal_only(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    # Two lines of a docstring, which are indented.
    assert "empty: input.txt in this folder, else Shakespeare's works" in shown


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code in (0, None)
    shown = capsys.readouterr().out
    assert f"gptforge {command}" in shown
    assert command != "doctor" or "[OPTIONS] [PATH]" in shown


@pytest.mark.parametrize(
    ("env", "command"),
    [
        ({}, "python gpt.py"),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node=2 gpt.py"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "torchrun ... --nproc_per_node=2 gpt.py"),
    ],
)
def test_launch_command(monkeypatch, env, command) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt.py"])
    assert train.resume_command(env, "--resume run") == f"{command} --resume run"


def test_under_torchrun_only_rank_0_runs_other_commands(program, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    args = ("plan", "--preset", "debug", "--device", "cpu")
    # Other launchers than torchrun set RANK, too.
    assert program(*args).out != ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = program(*args)
    assert (done.code, done.out) == (0, "")


def test_several_processes_need_torchrun(program, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = program("--preset", "debug")
    assert done.code == 2
    assert "torchrun" in done.err


def test_openmp_spinning_is_limited_unless_configured(monkeypatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    cli.limit_openmp_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == cli.GOMP_SPINCOUNT
    for name, value in (("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")):
        monkeypatch.delenv("GOMP_SPINCOUNT")
        monkeypatch.setenv(name, value)
        cli.limit_openmp_spinning()
        assert os.environ.get("GOMP_SPINCOUNT") == (value if name == "GOMP_SPINCOUNT" else None)
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")


def test_closed_standard_input_is_empty(program, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    done = program("prepare", "-", "--out", "out")
    assert done.code == 2
    assert "standard input: there is no text in it" in done.err
