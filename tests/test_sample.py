"""`gptforge sample`, with pipes in mind."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import read_chunks
from gptforge.inference.validation import normalize_prompt, prompt_from_argv
from tests.environment import python_path

DEBUG = ("--preset", "debug", "--device", "cpu", "--out_dir", "run")
SAMPLE = ("sample", "run", "--device", "cpu", "--max_new_tokens", 20)


@pytest.fixture
def trained(program, play):
    assert program(*DEBUG, "--input", play, "--max_steps", 6).code == 0
    return program


def test_json_gives_one_object_a_text(trained) -> None:
    done = trained(*SAMPLE, "--prompt", "ROMEO:", "--json", "--num_samples", 3)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["seed"] for record in records] == [1337, 1338, 1339]
    for record in records:
        assert record["prompt"] == "ROMEO:"
        assert len(record["text"]) == len(record["ids"]) == len(record["logprobs"]) == 20
        assert record["ended"] == "length"
        assert all(math.isfinite(p) and p < 0 for p in record["logprobs"])
    texts = [trained(*SAMPLE, "--prompt", "ROMEO:", "--seed", seed).out for seed in (1337, 1339)]
    assert texts == [f"ROMEO:{records[n]['text']}\n" for n in (0, 2)]


def test_the_prompt_may_come_from_a_pipe(trained, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("JULIET:\nWhat"))
    piped = trained(*SAMPLE, "--prompt", "-")
    assert piped.out == trained(*SAMPLE, "--prompt", "JULIET:\nWhat").out


def test_bytes_that_are_no_text_are_refused(trained, monkeypatch) -> None:
    # As Python hands on a byte that is not UTF-8, from a pipe or the command line.
    done = trained(*SAMPLE, "--prompt", "ROMEO\udcff")
    assert (done.code, done.out) == (2, "")
    assert "not UTF-8 text, at character 5" in done.err


def test_too_many_tokens_are_refused_before_memory_is_asked_for(trained) -> None:
    done = trained(*SAMPLE[:-1], 10**11)
    assert (done.code, done.out) == (2, "")
    assert "10,000,000 tokens at most" in done.err


def start(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "gptforge", *map(str, (*SAMPLE[:-1], 10**6, *args))]
    env = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


@pytest.mark.skipif(os.name == "nt", reason="signals are another matter there")
def test_ctrl_c_ends_it_without_a_traceback(trained) -> None:
    process = start("--prompt", "ROMEO:")
    assert process.stdout is not None
    assert process.stdout.read(20).startswith("ROMEO:")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("interrupted\n")


def test_a_reader_that_has_seen_enough_ends_it(trained) -> None:
    process = start("--prompt", "ROMEO:")
    assert process.stdout is not None
    assert process.stdout.read(6) == "ROMEO:"
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_an_interactive_loop_writes_on_from_each_line(trained, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO\n日\nJULIET\n"))
    done = trained(*SAMPLE, "--interactive")
    assert done.code == 0
    # The stray character is told of, and the next line has its turn.
    assert "'日'" in done.err
    first = trained(*SAMPLE, "--prompt", "ROMEO").out
    third = trained(*SAMPLE, "--prompt", "JULIET", "--seed", 1339).out
    assert done.out == first + third


def test_a_small_model_takes_one_thread_in_a_program_and_none_from_a_library(
    trained, monkeypatch
) -> None:
    import torch

    from gptforge import load

    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    load("run", device="cpu").generate("R", 1)
    assert taken == []
    trained(*SAMPLE)
    assert taken == [1]


def test_several_stop_texts_end_it(trained) -> None:
    whole = trained(*SAMPLE, "--prompt", "ROMEO:").out.removeprefix("ROMEO:")
    stops = [whole[9], whole[5]]
    done = trained(*SAMPLE, "--prompt", "ROMEO:", "--stop", stops[0], "--stop", stops[1])
    ends = min(whole.index(stop) for stop in stops)
    assert done.out == f"ROMEO:{whole[:ends]}\n"
    record = json.loads(trained(*SAMPLE, "--json", "--prompt", "ROMEO:", "--stop", stops[0]).out)
    assert (record["ended"], record["text"]) == ("stop", whole[: whole.index(stops[0])])


@pytest.mark.parametrize("args", [("--interactive", "--json"), ("--dtype", "int4")])
def test_what_cannot_be_had_is_refused(trained, args) -> None:
    done = trained(*SAMPLE, *args)
    assert (done.code, done.out) == (2, "")


def test_a_piped_prompt_is_read_as_files_are_in_any_locale(trained) -> None:
    # PYTHONIOENCODING stands for a locale: which ones there are differs between systems.
    env = {**os.environ, "PYTHONPATH": python_path(), "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-m", "gptforge", *map(str, SAMPLE), "--prompt", "-"]
    raw = "\ufeffJULIET:\r\nWhat\r\né".encode()
    done = subprocess.run(command, input=raw, env=env, capture_output=True)
    assert "the character 'é' is not in" in done.stderr.decode()
    done = subprocess.run(command, input=raw[:-2], env=env, capture_output=True, check=True)
    assert done.stdout.startswith(b"JULIET:\nWhat\n")


@pytest.mark.parametrize(
    ("raw", "text"),
    [("a\r\nb", "a\nb"), ("a\r\r\nb", "a\r\nb"), ("\ufeffa", "a"), ("a\rb\n", "a\rb\n")],
)
def test_a_prompt_becomes_what_a_file_would(tmp_path, raw, text) -> None:
    (tmp_path / "t.txt").write_bytes(raw.encode())
    (source,) = find_sources([str(tmp_path / "t.txt")])
    assert "".join(chunk.text for chunk in read_chunks(source)) == text
    assert normalize_prompt(raw) == prompt_from_argv(raw) == text


def test_a_flag_is_utf_8_in_any_locale(monkeypatch) -> None:
    # What Python makes of the UTF-8 bytes of é where the locale is latin-1.
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    assert prompt_from_argv("\xc3\xa9") == "é"
    assert prompt_from_argv("é") == "é"
    assert prompt_from_argv("日") == "日"


def test_seeds_behind_the_largest_begin_anew(trained) -> None:
    largest = 2**63 - 1
    done = trained(*SAMPLE, "--json", "--num_samples", 3, "--seed", largest)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert [record["seed"] for record in records] == [largest, 0, 1]
    assert trained(*SAMPLE, "--seed", 0).out == records[1]["text"] + "\n"
    for seed in (largest + 1, -1):
        refused = trained(*SAMPLE, "--seed", seed)
        assert (refused.code, refused.out) == (2, "")
        assert "below 2**63" in refused.err
