"""Printed commands run when they are pasted into a shell."""

import os
import shlex
import subprocess
import sys

import pytest

from gptforge import shell

NAMES = [
    "a b",
    "$x",
    "[x]*",
    "it's",
    "~",
    "a;b",
    "-v",
    "--help",
    "a\nb",
    "`id`",
    "a\\b",
    "!x",
    "#x",
]


@pytest.mark.skipif(os.name == "nt", reason="POSIX shells")
@pytest.mark.parametrize("name", NAMES)
def test_quoted_path_survives_a_shell(name) -> None:
    output = subprocess.check_output(["sh", "-c", f"printf %s {shell.quote(name)}"], text=True)
    assert os.path.normpath(output) == os.path.normpath(name)
    assert not output.startswith("-")


@pytest.mark.parametrize(
    ("argv0", "expected"),
    [
        ("gpt.py", ["python", "gpt.py"]),
        ("my dir/$x/gpt.py", ["python", "my dir/$x/gpt.py"]),
        ("/usr/bin/gptforge", ["gptforge"]),
        ("/usr/lib/gptforge/__main__.py", ["python", "-m", "gptforge"]),
    ],
)
def test_program_name_is_how_it_was_started(monkeypatch, argv0, expected) -> None:
    monkeypatch.setattr(sys, "argv", [argv0])
    assert shlex.split(shell.program_name()) == expected


def printed_args(out: str, before: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if before in line]
    args = shlex.split(line.partition(before)[2])
    return args[args.index("gptforge") + 1 :]


def test_commands_printed_by_prepare_and_train_run(program, play, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gptforge"])
    done = program("prepare", play, "--tokenizer", "char", "--out", "-a $x [b]* it's")
    assert done.code == 2, "the value of a flag must not start with a dash"
    done = program("prepare", play, "--tokenizer", "char", "--out", "./-a $x [b]* it's")
    assert done.code == 0, done.err
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 2)
    again = printed_args(done.out, "Train on it: ")
    done = program(*again, *small, "--out_dir", "runs/[a] $b's")
    assert done.code == 0, done.err
    done = program(*printed_args(done.out, "Try it: "), "--device", "cpu", "--max_new_tokens", 2)
    assert done.code == 0, done.err
    done = program(*again, *small, "--out_dir", "runs/[a] $b's")
    finished = printed_args(done.out, "or try the model: ")
    assert program(*finished, "--device", "cpu", "--max_new_tokens", 2).code == 0


def test_hint_for_a_file_without_a_flag_is_quoted(program, tmp_path) -> None:
    (tmp_path / "my text.txt").write_text("text")
    done = program("my text.txt")
    assert "to train on that file: --input 'my text.txt'" in done.err


def test_unset_variable_has_its_default() -> None:
    assert shell.env_int("RANK", 7, {}) == 7


@pytest.mark.parametrize("name", ["WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"])
def test_program_names_a_bad_variable_in_one_line(program, monkeypatch, play, name) -> None:
    monkeypatch.setenv(name, "x")
    done = program("--preset", "debug", "--input", play, "--max_steps", 1, "--device", "cpu")
    assert done.code == 2 and done.err.startswith(f"error: the environment variable {name} is 'x'")
    assert len(done.err.splitlines()) == 1
