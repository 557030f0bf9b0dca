"""One boundary: whatever a parser raises is one line that names the file."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch

from gptforge import tokenizers
from gptforge.checkpoint.state_dict import load_rng_state_dict
from gptforge.config import (
    Config,
    merge,
    read_toml,
    validate,
)
from gptforge.convert.bundle import is_dense_real
from gptforge.distributed.init import init_distributed, is_distributed_launch
from gptforge.errors import (
    RunError,
    Terminated,
    UserError,
    parsing,
)
from gptforge.report.curves import plot_curves
from gptforge.report.metrics import read_history
from gptforge.report.verdict import verdict
from gptforge.shell import env_int
from gptforge.tokenizers.char import CharTokenizer
from gptforge.tokenizers.gpt2 import GPT2Tokenizer


class PanicException(BaseException):
    """As a panic inside a Rust library comes to Python."""


@pytest.mark.parametrize(
    ("error", "words"),
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
def test_what_a_parser_raises_names_the_file(error, words) -> None:
    with pytest.raises(UserError) as caught, parsing("a.json", "a state", "save it again"):
        raise error
    assert str(caught.value) == f"a.json: not a state ({words}): save it again"


def test_errors_in_words_pass_or_get_the_files_name() -> None:
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
def test_what_ends_the_program_passes(error) -> None:
    with pytest.raises(type(error)), parsing("a.json", "a state"):
        raise error


@pytest.mark.parametrize("merges", [["a b", "a b"], ["a b", "b c", "ab c", "a bc"]])
def test_merges_that_make_a_token_twice_are_refused_before_tiktoken_sees_them(
    tmp_path, merges
) -> None:
    with pytest.raises(UserError, match="makes a token that is there already"):
        GPT2Tokenizer(merges)
    record = {"format": "gptforge-tokenizer", "version": 1, "kind": "gpt2", "merges": merges}
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer .*there already"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_an_alphabet_is_of_whole_characters() -> None:
    with pytest.raises(UserError, match="halves of surrogate pairs"):
        CharTokenizer("a\ud800")


@pytest.mark.parametrize(
    "state",
    [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), torch.zeros(5056, dtype=torch.uint8)],
)
def test_a_generators_state_of_another_form_is_refused_and_changes_nothing(state) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="step-000002: 'cpu': not a random generator's state"):
        load_rng_state_dict({"cpu": state}, torch.device("cpu"), source="step-000002")
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_beyond_64_bits_are_refused_in_a_file_and_as_a_flag(tmp_path) -> None:
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


def test_events_of_odd_numbers_are_left_out_of_curves_and_verdict(tmp_path) -> None:
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
    assert "2.0000" in verdict(history, total_steps=4, epochs=1, out_dir="r", has_val=True)


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x', not a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"LOCAL_RANK": "1e3"}, "LOCAL_RANK is '1e3'"),
        ({"LOCAL_RANK": "5"}, "LOCAL_RANK is 5 and LOCAL_WORLD_SIZE 2"),
        ({"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999: give a port"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE is '999"),
    ],
)
def test_launch_variables_that_are_no_numbers_are_named(changed, words) -> None:
    with pytest.raises(UserError) as caught:
        init_distributed("cpu", env={**LAUNCHED, **changed})
    assert words in str(caught.value)


def test_a_launch_variable_that_is_not_set_has_its_default(monkeypatch) -> None:
    assert not is_distributed_launch({}) and env_int("RANK", 7, {}) == 7


@pytest.mark.parametrize("name", ["WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"])
def test_the_program_names_a_bad_variable_in_one_line(program, monkeypatch, play, name) -> None:
    monkeypatch.setenv(name, "x")
    done = program("--preset", "debug", "--input", play, "--max_steps", 1, "--device", "cpu")
    assert done.code == 2 and done.err.startswith(f"error: the environment variable {name} is 'x'")
    assert len(done.err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
@pytest.mark.parametrize(
    "words",
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
def test_a_loop_of_links_is_a_mistake_in_one_line(program, words) -> None:
    Path("t.txt").write_text("To be, or not to be.\n" * 200)
    Path("loop").symlink_to("loop")
    done = program(*words)
    assert done.code == 2 and done.err.startswith("error: ") and "loop" in done.err
    assert len(done.err.splitlines()) == 1
