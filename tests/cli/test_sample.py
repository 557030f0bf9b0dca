"""`gptforge sample`: stdout, pipes, JSON and seeds."""

import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptforge
from gptforge import cli
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import InputPart
from gptforge.inference.validation import normalize_prompt, prompt_from_argv
from tests.environment import python_path

SAMPLE_SEED = 1337
SAMPLE = ("sample", "run", "--device", "cpu", "--max_new_tokens", 20)

pytestmark = pytest.mark.usefixtures("run")


def test_stdout_is_the_prompt_and_its_continuation(program) -> None:
    args = ("sample", "run", "--prompt", "ROMEO:", "--max_new_tokens", 40, "--device", "cpu")
    done = program(*args)
    assert done.code == 0
    # 46 characters, but block_size is 32.
    assert re.fullmatch(r"note: [^\n]*\b32\b[^\n]*\n", done.err)
    assert done.out.startswith("ROMEO:")
    assert len(done.out) == len("ROMEO:") + 40 + 1
    assert program(*args).out == done.out
    assert program(*args, "--seed", 5).out != done.out
    assert program(*args, "--num_samples", 3).out.count("\n---\n") == 2
    assert program("sample", "run/checkpoints/step-000010", "--device", "cpu").code == 0


def test_json_is_one_object_per_text(program) -> None:
    done = program(*SAMPLE, "--prompt", "ROMEO:", "--json", "--num_samples", 3)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["seed"] for record in records] == [1337, 1338, 1339]
    for record in records:
        assert record["prompt"] == "ROMEO:"
        assert len(record["text"]) == len(record["ids"]) == len(record["logprobs"]) == 20
        assert record["ended"] == "length"
        assert all(math.isfinite(p) and p < 0 for p in record["logprobs"])
    texts = [program(*SAMPLE, "--prompt", "ROMEO:", "--seed", seed).out for seed in (1337, 1339)]
    assert texts == [f"ROMEO:{records[n]['text']}\n" for n in (0, 2)]


def test_prompt_from_stdin(program, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("JULIET:\nWhat"))
    piped = program(*SAMPLE, "--prompt", "-")
    assert piped.out == program(*SAMPLE, "--prompt", "JULIET:\nWhat").out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        # How Python passes on a byte of argv that is not UTF-8.
        (("--prompt", "ROMEO\udcff"), "not UTF-8 text, at character 5"),
        (("--prompt", "日"), "'日'"),
        (("--max_new_tokens", 10**11), "10,000,000 tokens"),
        (("--seed", 10**30), "below 2**63"),
        (("--seed", -1), "below 2**63"),
        (("--temperature", -1), "temperature"),
        (("--interactive", "--json"), "--interactive"),
        (("--dtype", "int4"), "int4"),
    ],
)
def test_user_errors_leave_stdout_empty(program, args, words) -> None:
    done = program(*SAMPLE, *args)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def start_endless(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "gptforge", *map(str, (*SAMPLE[:-1], 10**6, *args))]
    env = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_ctrl_c_ends_without_a_traceback() -> None:
    process = start_endless("--prompt", "ROMEO:")
    assert process.stdout is not None
    assert process.stdout.read(20).startswith("ROMEO:")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("interrupted\n")


def test_a_closed_pipe_ends_without_a_traceback() -> None:
    process = start_endless("--prompt", "ROMEO:")
    assert process.stdout is not None
    assert process.stdout.read(6) == "ROMEO:"
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


@pytest.mark.parametrize("flags", [("--prompt", "-"), ("--interactive",)])
def test_a_closed_standard_input_is_empty(program, monkeypatch, flags) -> None:
    monkeypatch.setattr("sys.stdin", None)
    done = program(*SAMPLE, *flags)
    expected = program(*SAMPLE).out if "-" in flags else ""
    assert (done.code, done.out) == (0, expected), done.err


def test_interactive_continues_each_line(program, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO\n日\nJULIET\n"))
    done = program(*SAMPLE, "--interactive")
    assert done.code == 0
    # The unknown character is reported, and the next line is read.
    assert "'日'" in done.err
    first = program(*SAMPLE, "--prompt", "ROMEO").out
    third = program(*SAMPLE, "--prompt", "JULIET", "--seed", 1339).out
    assert done.out == first + third


def read_until(terminal: int, text: str) -> str:
    """What a terminal shows until `text` has been printed and half a second is quiet."""
    shown = ""
    while select.select([terminal], [], [], 0.5 if text in shown else 120)[0]:
        try:
            shown = (shown + os.read(terminal, 4096).decode()).replace("\r\n", "\n")
        except OSError:  # Linux reports the end like this
            break
    return shown


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudoterminals")
def test_interactive_terminal_has_line_editing_and_a_history(program) -> None:
    pytest.importorskip("readline")
    terminal, child = os.openpty()
    env = {**os.environ, "PYTHONPATH": python_path(), "TERM": "dumb", "INPUTRC": os.devnull}
    command = [sys.executable, "-m", "gptforge", *map(str, SAMPLE), "--interactive"]
    process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env)
    os.close(child)
    try:
        assert "Ctrl-D quits.\n\n> " in read_until(terminal, "> ")
        up, backspace = b"\x1b[A", b"\x7f"
        for seed, keys in enumerate((b"ROMEX" + backspace + b"O\n", up + b"\n"), SAMPLE_SEED):
            os.write(terminal, keys)
            text = program(*SAMPLE, "--prompt", "ROMEO", "--seed", seed).out
            assert f"\n{text}" in read_until(terminal, f"{text[-5:]}\n> ")
        os.write(terminal, b"\x04")
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_a_note_is_printed_after_the_text(monkeypatch) -> None:
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert cli.main([*map(str, SAMPLE), "--prompt", "ROMEO:", "--max_new_tokens", "60"]) == 0
    text, end, note = both.getvalue().rpartition("\nnote: ")
    assert len(text) == len("ROMEO:") + 60 and end
    assert "window shifts" in note


def test_only_the_program_limits_the_threads_for_a_small_model(program, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    gptforge.load("run", device="cpu").generate("R", 1)
    assert calls == []
    program(*SAMPLE)
    assert calls == [1]


def test_the_first_of_several_stop_texts_ends_it(program) -> None:
    text = program(*SAMPLE, "--prompt", "ROMEO:").out.removeprefix("ROMEO:")
    stops = [text[9], text[5]]
    done = program(*SAMPLE, "--prompt", "ROMEO:", "--stop", stops[0], "--stop", stops[1])
    end = min(text.index(stop) for stop in stops)
    assert done.out == f"ROMEO:{text[:end]}\n"
    record = json.loads(program(*SAMPLE, "--json", "--prompt", "ROMEO:", "--stop", stops[0]).out)
    assert (record["ended"], record["text"]) == ("stop", text[: text.index(stops[0])])


def test_stdin_is_utf8_in_any_locale(program, monkeypatch) -> None:
    # The UTF-8 bytes of the byte order mark are no such characters in latin-1.
    raw = "\ufeffJULIET:\r\nWhat".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "latin-1"))
    assert program(*SAMPLE, "--prompt", "-").out.startswith("JULIET:\nWhat")


@pytest.mark.parametrize(
    ("raw", "text"),
    [("a\r\nb", "a\nb"), ("a\r\r\nb", "a\r\nb"), ("\ufeffa", "a"), ("a\rb\n", "a\rb\n")],
)
def test_prompts_are_normalized_like_files(tmp_path, raw, text) -> None:
    (tmp_path / "t.txt").write_bytes(raw.encode())
    (source,) = find_sources([str(tmp_path / "t.txt")])
    assert "".join(chunk.text for chunk in InputPart(source).read_chunks()) == text
    assert normalize_prompt(raw) == prompt_from_argv(raw) == text


def test_argv_is_utf8_in_any_locale(monkeypatch) -> None:
    # How Python decodes the UTF-8 bytes of é if the locale is latin-1.
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    assert prompt_from_argv("\xc3\xa9") == "é"
    assert prompt_from_argv("é") == "é"
    assert prompt_from_argv("日") == "日"


def test_seeds_wrap_around(program) -> None:
    largest = 2**63 - 1
    done = program(*SAMPLE, "--json", "--num_samples", 3, "--seed", largest)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["seed"] for record in records] == [largest, 0, 1]
    assert program(*SAMPLE, "--seed", 0).out == records[1]["text"] + "\n"


def test_the_library_loads_a_run() -> None:
    model = gptforge.load("run", device="cpu")
    text = model.generate("JULIET", max_new_tokens=12, temperature=0.5, top_k=5, seed=3)
    assert "".join(model.stream("JULIET", 12, temperature=0.5, top_k=5, seed=3)) == text
    assert model.decode(model.encode("JULIET")) == "JULIET"
    assert model.logits(model.encode("JULIET")).shape == (6, model.tokenizer.vocab_size)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no symbolic links by default")
def test_pointer_files_replace_links(program) -> None:
    for which in ("best", "last"):
        pointer = Path("run/checkpoints") / which
        name = pointer.readlink().name
        pointer.unlink()
        pointer.write_text(f"{name}\n")
        done = program("sample", pointer, "--max_new_tokens", 3, "--device", "cpu")
        assert done.code == 0, done.err


def test_an_intact_checkpoint_is_suggested_for_a_corrupt_one(program) -> None:
    best = Path("run/checkpoints/best").resolve()
    intact = max(path for path in best.parent.glob("step-*") if path != best)
    (best / "model.safetensors").write_bytes(b"")
    done = program("sample", "run", "--device", "cpu")
    assert done.code == 2
    assert intact.name in done.err
