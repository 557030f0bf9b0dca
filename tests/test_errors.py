"""Any error of a parser becomes one line that names the file."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch

from gptforge import tokenizers
from gptforge.cli import COMMANDS
from gptforge.config import Config, merge
from gptforge.config_checks import validate
from gptforge.config_file import read_toml
from gptforge.convert.bundle import is_dense_real
from gptforge.errors import (
    DeviceError,
    RunError,
    Terminated,
    UserError,
    explain_device_errors,
    explain_os_error,
    parsing,
)
from gptforge.report.curves import plot_curves
from gptforge.report.metrics import read_history
from gptforge.report.verdict import verdict
from gptforge.tokenizers.char import CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer


class PanicException(BaseException):
    """How a panic in a Rust library reaches Python."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("n_embd"), "'n_embd' is missing"),
        (TypeError("unhashable"), "TypeError: unhashable"),
        (OverflowError("int too large"), "OverflowError: int too large"),
        (RecursionError("deep"), "RecursionError: deep"),
        (ValueError("no size"), "no size"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (struct.error("short"), "error: short"),
        (AssertionError(), "AssertionError"),
        (PanicException("index out of bounds"), "PanicException: index out of bounds"),
    ],
)
def test_parser_error_names_the_file(error, reason) -> None:
    with pytest.raises(UserError) as caught, parsing("a.json", "a state", "save it again"):
        raise error
    assert str(caught.value) == f"a.json: not a state ({reason}): save it again"


def test_user_error_gets_the_name_of_the_file_once() -> None:
    with pytest.raises(UserError, match=r"^a\.json has no tokens$"), parsing("a.json", "a state"):
        raise UserError("a.json has no tokens")
    with pytest.raises(UserError, match=r"^a\.json: not a state \(no tokens\)$"):  # noqa: SIM117
        with parsing("a.json", "a state"):
            raise UserError("no tokens")
    with pytest.raises(UserError, match=r"^a\.json: there is no such file$"):  # noqa: SIM117
        with parsing("a.json", "a state"):
            Path("nowhere/a.json").read_text()


@pytest.mark.parametrize(
    "error", [RunError("full"), KeyboardInterrupt(), SystemExit(3), Terminated()]
)
def test_exceptions_that_end_the_program_pass(error) -> None:
    with pytest.raises(type(error)), parsing("a.json", "a state"):
        raise error


@pytest.mark.parametrize("merges", [["a b", "a b"], ["a b", "b c", "ab c", "a bc"]])
def test_merges_that_make_a_token_twice_are_refused(tmp_path, merges) -> None:
    with pytest.raises(UserError, match="makes a token that is there already"):
        GPT2Tokenizer(merges)
    record = {"format": "gptforge-tokenizer", "version": 1, "kind": "gpt2", "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer .*there already"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_alphabet_with_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UserError, match="lone surrogates"):
        CharTokenizer("a\ud800")


def test_numbers_beyond_64_bits_are_refused(tmp_path) -> None:
    (tmp_path / "c.toml").write_text(f"n_layer = 0x{'f' * 9000}\n")
    values, _ = read_toml(tmp_path / "c.toml")
    with pytest.raises(UserError, match="n_layer must be below 2"):
        merge(Config(), values, source="c.toml")
    with pytest.raises(UserError, match="--max_steps must be below 2"):
        validate(Config(max_steps=10**30))


@pytest.mark.parametrize(
    "tensor",
    [None, [1.0], torch.zeros(2, dtype=torch.complex64), torch.zeros(2).to_sparse(),
     torch.zeros(2, device="meta")],
)  # fmt: skip
def test_only_dense_real_tensors_become_weights(tensor) -> None:
    assert not is_dense_real(tensor)


ODD = ["x", [], {}, True, 10**400, float("nan"), float("inf"), 1e300, -1, None]


def test_events_with_invalid_numbers_are_skipped(tmp_path) -> None:
    good = {"event": "train", "step": 3, "loss": 2.0, "dt_ms": 1.0, "tok_per_sec": 9.0, "norm": 1.0}
    lines = [json.dumps({**good, name: odd}) for name in good for odd in ODD]
    score = {"event": "eval", "step": 3, "val_loss": 2.0, "val_bpb": 1.0, "epoch": 1.0}
    lines += [json.dumps({**score, name: odd}) for name in score for odd in ODD]
    lines += ["[" * 100_000, "9" * 5000, "null", '"train"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    history = read_history(tmp_path / "metrics.jsonl")
    assert history.train and history.evals
    assert all(type(event["step"]) is int for event in history.train + history.evals)
    plot_curves(history, title="t")
    assert "2.0000" in verdict(history, max_steps=4, out_dir="r", has_val=True)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
@pytest.mark.parametrize(
    "args",
    [
        ["--preset", "debug", "--input", "t.txt", "--out_dir", "loop"],
        ["--preset", "debug", "--input", "t.txt", "--out_dir", "loop/run"],
        ["--preset", "debug", "--input", "loop"],
        ["--config", "loop"],
        ["--preset", "debug", "--input", "t.txt", "--tokenizer", "loop"],
        ["prepare", "t.txt", "--out", "loop"],
        ["prepare", "loop", "--out", "o"],
        ["sample", "loop"],
        ["plan", "--preset", "debug", "--input", "t.txt", "--out_dir", "loop"],
    ],
)
def test_loop_of_links_is_one_line_of_error(program, args) -> None:
    Path("t.txt").write_text("To be, or not to be.\n" * 200)
    Path("loop").symlink_to("loop")
    done = program(*args)
    assert done.code == 2 and done.err.startswith("error: ") and "loop" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "reason", "fix"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full", "free some space"),
        (OSError(errno.EFBIG, "x"), "the file would exceed the size limit", "ulimit -f"),
        (OSError(errno.EROFS, "x"), "the disk is read-only", "make it writable"),
        (OSError(errno.EACCES, "x"), "permission denied", "change the permissions"),
        (OSError(errno.EMFILE, "x"), "too many open files", "ulimit -n"),
        (OSError(errno.EIO, "x"), "input/output error", "check the disk"),
        (OSError(errno.ENOENT, "gone", "a.txt"), "gone", ""),
        (OSError("unnumbered"), "unnumbered", ""),
        (RuntimeError("I/O error: File too large (os error 27)"), "the file would", "ulimit -f"),
    ],
)
def test_advice_on_a_failed_file_operation_fits_its_error_number(error, reason, fix) -> None:
    found, hint = explain_os_error(error)
    assert found.startswith(reason)
    assert fix in hint and bool(fix) == bool(hint)


@pytest.mark.parametrize("command", ["train", "prepare"])
@pytest.mark.skipif(os.name == "nt", reason="Windows has no ulimit")
def test_a_file_size_limit_is_not_called_a_full_or_broken_disk(
    command, program, tmp_path, monkeypatch
) -> None:
    import resource

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("Some words, and some more. " * 8000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        if command == "train":
            done = program("--input", "t.txt", "--preset", "debug", "--tokenizer", "byte")
        else:
            done = program("prepare", "t.txt", "--out", "shards", "--tokenizer", "byte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert "the file would exceed the size limit" in done.err and "ulimit -f" in done.err
    assert "free some space" not in done.err and "check the disk" not in done.err


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), RunError, "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RunError, "too little memory"),
        (torch.AcceleratorError("CUDA error: ECC\nhelp"), DeviceError, "the GPU failed: .*ECC$"),
        (RuntimeError("shapes do not match"), RuntimeError, "^shapes do not match$"),
        (RunError("no finite loss"), RunError, "^no finite loss$"),
    ],
)
def test_a_device_without_memory_or_that_failed_is_one_line(error, kind, message) -> None:
    with pytest.raises(RuntimeError, match=message) as caught, explain_device_errors():
        raise error
    assert type(caught.value) is kind


def test_a_device_without_memory_ends_any_command_in_one_line(program, monkeypatch) -> None:
    def fail(args: list[str]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setitem(COMMANDS, "sample", (fail, *COMMANDS["sample"][1:]))
    done = program("sample", "run")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "too little memory" in done.err
