"""`gptforge eval --data`: which text is evaluated, and the warnings about it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from gptforge.report import progress
from tests.programs import DEBUG

FEW = (*DEBUG, "--max_steps", 2)
EVAL = ("eval", "run", "--device", "cpu")


@pytest.fixture
def accented(play) -> Path:
    """A text whose bytes differ in utf-8 and latin-1, with each letter early on."""
    play.write_text(play.read_text().replace("e", "é"), encoding="utf-8")
    return play


def test_data_is_read_in_another_encoding_than_the_run(program, accented) -> None:
    text = accented.read_text(encoding="utf-8")
    Path("old.txt").write_bytes(text.encode("latin-1"))
    trained = program(
        *FEW, "--input", "old.txt", "--encoding", "latin-1", "--tokenizer", "byte", "--out_dir=run"
    )
    assert trained.code == 0
    score = json.loads(program(*EVAL, "--json", "--data", accented).out)
    assert score["bytes"] == len(text.encode()) - 1
    refused = program(*EVAL, "--data", "old.txt")
    assert refused.code == 2
    assert "old.txt: not utf-8" in refused.err
    with_encoding = json.loads(
        program(*EVAL, "--json", "--data", "old.txt", "--encoding", "latin-1").out
    )
    assert with_encoding == score
    # The held-out text is still read as the run read it.
    assert program(*EVAL).code == 0


def test_encoding_without_data_is_refused(program, play) -> None:
    program(*FEW, "--input", play, "--out_dir", "run")
    done = program(*EVAL, "--encoding", "latin-1")
    assert done.code == 2
    assert "--encoding describes the text of --data" in done.err


@pytest.mark.parametrize("is_prepared", [True, False])
def test_validation_split_of_shards_is_evaluated(program, play, is_prepared) -> None:
    assert program("prepare", play, "--out", "shards", "--tokenizer", "byte").code == 0
    if not is_prepared:
        # Shards of another program are split by their names.
        Path("shards/index.json").unlink()
        shutil.rmtree("shards/.preparing", ignore_errors=True)
    assert program(*FEW, "--input", "shards", "--tokenizer=byte", "--out_dir=run").code == 0
    done = program(*EVAL, "--data", "shards")
    assert done.code == 0
    assert "note: evaluating the validation split of shards" in done.err
    assert "warning" not in done.err
    numbers = re.compile(r"[\d.,]+")
    assert numbers.findall(done.out) == numbers.findall(program(*EVAL).out)


def test_warning_if_trained_on_the_validation_split(program, play) -> None:
    assert program("prepare", play, "--out", "shards", "--tokenizer", "byte").code == 0
    train_on_all = ("--val_fraction", 0, "--tokenizer", "byte", "--out_dir", "run")
    assert program(*FEW, "--input", play, *train_on_all).code == 0
    done = program(*EVAL, "--data", "shards")
    assert "warning: run was trained on shards" in done.err
    # Nothing was held out, so there is nothing better to evaluate.
    assert "without --data" not in done.err


def test_long_evaluation_prints_an_estimate(program, play, monkeypatch) -> None:
    assert program(*FEW, "--input", play, "--out_dir", "run", "--batch_size", 2).code == 0
    words = r"evaluating [\d,]+ tokens takes about .* more"
    assert not re.search(words, program(*EVAL, "--data", play).err)
    monkeypatch.setattr(progress, "MIN_SECONDS", 0.0)
    assert len(re.findall(words, program(*EVAL, "--data", play).err)) == 1


def test_repairs_of_a_text_are_printed_once(program) -> None:
    Path("dos.txt").write_bytes(b"ROMEO:\r\nBut soft\r\n" * 300)
    for folder in ("fresh", "again"):
        out = program(*FEW, "--input", "dos.txt", "--out_dir", folder).out
        assert out.count("turned CRLF line ends into LF") == 1


def test_warning_for_training_files_and_their_copies(program, play) -> None:
    Path("d").mkdir()
    text = play.read_text()
    third = len(text) // 3
    for number, name in enumerate(("train.txt", "valid.txt", "test.txt")):
        Path("d", name).write_text(text[number * third : (number + 1) * third])
    assert program(*FEW, "--input", "d", "--tokenizer", "byte", "--out_dir", "run").code == 0
    shutil.copy("d/train.txt", "copy.txt")
    for name in ("d/train.txt", "copy.txt"):
        done = program(*EVAL, "--data", name)
        assert done.code == 0
        assert f"warning: run was trained on {name}, or on a part of it" in done.err
    for name in ("d/valid.txt", "d/test.txt"):
        done = program(*EVAL, "--data", name)
        assert done.code == 0
        assert "warning" not in done.err
    # Of the folder, the validation split is evaluated.
    done = program(*EVAL, "--data", "d")
    assert "note: evaluating the validation split of d" in done.err
    assert "warning" not in done.err
    numbers = re.compile(r"[\d.,]+")
    assert numbers.findall(done.out) == numbers.findall(program(*EVAL).out)


def test_warning_for_a_file_with_documents_in_both_splits(program) -> None:
    Path("d").mkdir()
    for half in (0, 1):
        lines = [json.dumps({"text": f"words of line {half} {i}"}) for i in range(100)]
        Path("d", f"{half}.jsonl").write_text("\n".join(lines))
    options = ("--tokenizer", "byte", "--context_length", 16, "--out_dir", "run")
    assert program("prepare", "d", "--out", "shards", "--tokenizer", "byte").code == 0
    assert program(*FEW, "--input", "shards", *options).code == 0
    done = program(*EVAL, "--data", "d/1.jsonl")
    assert "warning: run was trained on d/1.jsonl, or on a part of it" in done.err
    Path("other.jsonl").write_text(json.dumps({"body": "other words", "n": 2}))
    refused = program(*EVAL, "--data", "other.jsonl")
    assert "it has body: choose one with --field" in refused.err
    done = program(*EVAL, "--data", "other.jsonl", "--field", "body")
    assert done.code == 0
    assert "warning" not in done.err
