"""Commands that are printed run when they are pasted into a shell."""

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
def test_a_path_comes_through_a_shell_as_it_is(name) -> None:
    said = subprocess.check_output(["sh", "-c", f"printf %s {shell.quote(name)}"], text=True)
    assert os.path.normpath(said) == os.path.normpath(name)
    assert not said.startswith("-")


@pytest.mark.parametrize(
    ("called", "words"),
    [
        ("gpt.py", ["python", "gpt.py"]),
        ("my dir/$x/gpt.py", ["python", "my dir/$x/gpt.py"]),
        ("/usr/bin/gptforge", ["gptforge"]),
        ("/usr/lib/gptforge/__main__.py", ["python", "-m", "gptforge"]),
    ],
)
def test_the_program_is_called_as_it_was(monkeypatch, called, words) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert shlex.split(shell.program_name()) == words


def printed(out: str, before: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if before in line]
    words = shlex.split(line.partition(before)[2])
    return words[words.index("gptforge") + 1 :]


def test_what_preparing_and_training_print_runs(program, play, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gptforge"])
    done = program("prepare", play, "--tokenizer", "char", "--out", "-a $x [b]* it's")
    assert done.code == 2, "a flag's value does not begin with a dash"
    done = program("prepare", play, "--tokenizer", "char", "--out", "./-a $x [b]* it's")
    assert done.code == 0, done.err
    small = ("--preset", "debug", "--device", "cpu", "--max_steps", 2)
    again = printed(done.out, "Train on it: ")
    done = program(*again, *small, "--out_dir", "runs/[a] $b's")
    assert done.code == 0, done.err
    done = program(*printed(done.out, "Try it: "), "--device", "cpu", "--max_new_tokens", 2)
    assert done.code == 0, done.err
    done = program(*again, *small, "--out_dir", "runs/[a] $b's")
    finished = printed(done.out, "or try it: ")
    assert program(*finished, "--device", "cpu", "--max_new_tokens", 2).code == 0


def test_the_hint_for_a_file_without_a_flag_is_quoted(program, tmp_path) -> None:
    (tmp_path / "my text.txt").write_text("text")
    done = program("my text.txt")
    assert "to learn from that file: --input 'my text.txt'" in done.err
