"""`gptforge eval`: which text is evaluated, how it is read, and what is printed."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import play_text
from tests.programs import DEBUG, events

TRAIN = (*DEBUG, "--max_steps", 2, "--out_dir", "run")
EVAL = ("eval", "run", "--device", "cpu")


@pytest.fixture
def accented(play) -> Path:
    """A text with different bytes in utf-8 and latin-1, and with all its letters early on."""
    play.write_text(play.read_text().replace("e", "é"), encoding="utf-8")
    return play


def test_data_has_an_encoding_of_its_own(program, accented) -> None:
    text = accented.read_text(encoding="utf-8")
    Path("old.txt").write_bytes(text.encode("latin-1"))
    flags = ("--input", "old.txt", "--encoding", "latin-1", "--tokenizer", "byte")
    assert program(*TRAIN, *flags).code == 0
    score = json.loads(program(*EVAL, "--json", "--data", accented).out)
    assert score["bytes"] == len(text.encode()) - 1
    refused = program(*EVAL, "--data", "old.txt")
    assert refused.code == 2
    assert "old.txt: not utf-8" in refused.err
    explicit = json.loads(
        program(*EVAL, "--json", "--data", "old.txt", "--encoding", "latin-1").out
    )
    assert explicit == score
    # The run's own text is read in the run's encoding.
    assert program(*EVAL).code == 0


def test_a_limit_without_tasks_is_an_error(program) -> None:
    done = program(*EVAL, "--limit", 3)
    assert (done.code, done.err) == (2, "error: --limit needs --tasks\n")


def test_an_encoding_without_data_is_an_error(program, run) -> None:
    done = program(*EVAL, "--encoding", "latin-1")
    assert done.code == 2
    assert "--encoding describes the text of --data" in done.err


@pytest.mark.parametrize("is_prepared", [True, False])
def test_shards_are_evaluated_on_their_validation_split(program, play, is_prepared) -> None:
    assert program("prepare", play, "--out", "shards", "--tokenizer", "byte").code == 0
    if not is_prepared:
        # Without an index, as other programs write shards: split by file names.
        Path("shards/index.json").unlink()
        shutil.rmtree("shards/.preparing", ignore_errors=True)
    assert program(*TRAIN, "--input", "shards", "--tokenizer", "byte").code == 0
    done = program(*EVAL, "--data", "shards")
    assert done.code == 0
    assert "note: evaluating the validation split of shards" in done.err
    assert "warning" not in done.err
    numbers = re.compile(r"[\d.,]+")
    assert numbers.findall(done.out) == numbers.findall(program(*EVAL).out)


def test_training_text_in_shards_is_noticed(program, play) -> None:
    assert program("prepare", play, "--out", "shards", "--tokenizer", "byte").code == 0
    flags = ("--val_fraction", 0, "--tokenizer", "byte")
    assert program(*TRAIN, "--input", play, *flags).code == 0
    done = program(*EVAL, "--data", "shards")
    assert "warning: run was trained on shards" in done.err
    # The run has no validation split to evaluate on instead.
    assert "without --data" not in done.err


def test_a_conversion_of_line_ends_is_reported_once(program) -> None:
    Path("dos.txt").write_bytes(b"ROMEO:\r\nBut soft\r\n" * 300)
    for folder in ("fresh", "again"):
        out = program(*TRAIN, "--input", "dos.txt", "--out_dir", folder).out
        assert out.count("turned CRLF line ends into LF") == 1


def test_training_files_are_recognized_anywhere(program, play) -> None:
    Path("d").mkdir()
    text = play.read_text()
    third = len(text) // 3
    for number, name in enumerate(("train.txt", "valid.txt", "test.txt")):
        Path("d", name).write_text(text[number * third : (number + 1) * third])
    assert program(*TRAIN, "--input", "d", "--tokenizer", "byte").code == 0
    shutil.copy("d/train.txt", "copy.txt")
    for name in ("d/train.txt", "copy.txt"):
        done = program(*EVAL, "--data", name)
        assert done.code == 0
        assert f"warning: run was trained on {name}, or on a part of it" in done.err
    for name in ("d/valid.txt", "d/test.txt"):
        done = program(*EVAL, "--data", name)
        assert done.code == 0
        assert "warning" not in done.err
    # A folder is evaluated on its validation split.
    done = program(*EVAL, "--data", "d")
    assert "note: evaluating the validation split of d" in done.err
    assert "warning" not in done.err
    numbers = re.compile(r"[\d.,]+")
    assert numbers.findall(done.out) == numbers.findall(program(*EVAL).out)


def test_a_file_with_some_training_documents_is_recognized(program) -> None:
    Path("d").mkdir()
    for half in (0, 1):
        lines = [json.dumps({"text": f"words of line {half} {i}"}) for i in range(100)]
        Path("d", f"{half}.jsonl").write_text("\n".join(lines))
    flags = ("--tokenizer", "byte", "--context_length", 16)
    assert program("prepare", "d", "--out", "shards", "--tokenizer", "byte").code == 0
    assert program(*TRAIN, "--input", "shards", *flags).code == 0
    done = program(*EVAL, "--data", "d/1.jsonl")
    assert "warning: run was trained on d/1.jsonl, or on a part of it" in done.err
    Path("other.jsonl").write_text(json.dumps({"body": "other words", "n": 2}))
    refused = program(*EVAL, "--data", "other.jsonl")
    assert "it has body: choose one with --field" in refused.err
    done = program(*EVAL, "--data", "other.jsonl", "--field", "body")
    assert done.code == 0
    assert "warning" not in done.err


def test_json_has_the_loss_of_the_best_checkpoint(program, run) -> None:
    done = program("eval", "run", "--json", "--device", "cpu")
    score = json.loads(done.out)
    evals = [event for event in events() if event["event"] == "eval"]
    best = min(evals, key=lambda event: event["val_loss"])
    assert score["loss"] == pytest.approx(best["val_loss"], rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(best["val_bpb"], rel=1e-5)
    val_text = play_text()[int(len(play_text()) * 0.9) :]
    assert score["tokens"] == len(val_text) - 1
    # A character tokenizer's loss is per character.
    assert score["nats_per_char"] == pytest.approx(score["loss"])
    assert score["nats_per_char"] == pytest.approx(best["val_nats_per_char"], rel=1e-5)


def test_losses_of_other_vocabularies_compare_per_character(program, play) -> None:
    play.write_text(play.read_text() + "naïve 日本\n" * 99, encoding="utf-8")
    flags = ("--input", play, "--tokenizer", "gpt2", "--n_embd", 16)
    done = program(*TRAIN, *flags)
    event = [event for event in events() if event["event"] == "eval"][-1]
    assert f"nats per character: {event['val_nats_per_char']:.4f}" in done.out
    score = json.loads(program(*EVAL, "--json").out)
    val_text = play.read_text(encoding="utf-8")
    val_text = val_text[int(len(val_text) * 0.9) :]
    # The first token is not predicted.
    assert 0 < len(val_text) - score["characters"] < 10
    assert score["characters"] < score["bytes"]
    nats = score["loss"] * score["tokens"]
    assert score["nats_per_char"] * score["characters"] == pytest.approx(nats)
    assert score["bits_per_byte"] * score["bytes"] * math.log(2) == pytest.approx(nats)
    assert "nats per character, over" in program(*EVAL).out


def test_training_text_and_changed_text_are_noticed(program, play) -> None:
    assert program(*TRAIN, "--input", play).code == 0
    on_training_text = program("eval", "run", "--data", play, "--device", "cpu")
    assert on_training_text.code == 0
    assert on_training_text.out.startswith(f"loss on {play}")
    assert on_training_text.err != ""
    play.write_text(play.read_text() + "More.")
    changed = program("eval", "run", "--device", "cpu")
    assert changed.code == 2
    assert "has changed" in changed.err


def test_text_that_another_split_holds_out_is_noticed(program, play) -> None:
    prepare = ("prepare", play, "--out", "shards", "--tokenizer", "byte")
    assert program(*prepare).code == 0
    assert program(*TRAIN, "--input", "shards").code == 0
    second = (*DEBUG, "--max_steps", 2, "--init_from", "run", "--input", "shards")
    assert "warning: run" not in program(*second, "--out_dir", "same").out
    assert program(*prepare, "--val_fraction", 0.5, "--restart").code == 0
    changed = program(*EVAL)
    assert changed.code == 2
    assert "shards has changed since run was trained on it, and so has the held-out" in changed.err
    done = program(*second, "--out_dir", "other")
    assert done.code == 0
    assert "warning: run was trained on shards, and the held-out loss will be too low" in done.out


def test_the_bundled_text_is_found_from_any_folder(program, monkeypatch, tmp_path) -> None:
    Path("input.txt").write_bytes((Path(__file__).parents[2] / "input.txt").read_bytes())
    assert program(*TRAIN, "--val_fraction", 0.002).code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program("eval", "../run", "--device", "cpu").code == 0


def test_a_model_without_a_run_needs_data(program, run) -> None:
    (Path("run/checkpoints/last").resolve() / "state.json").unlink()
    done = program("eval", "run/checkpoints/last", "--device", "cpu")
    assert done.code == 2
    assert "--data" in done.err


def test_a_text_that_was_moved_can_be_put_back_for_its_held_out_part(program, play) -> None:
    text = Path("book.txt")
    shutil.copy(play, text)
    assert program(*TRAIN, "--input", text).code == 0
    expected = program(*EVAL).out
    moved = text.rename("moved.txt")
    gone = program(*EVAL)
    assert gone.code == 2
    assert "book.txt, is not here: put it back, or give another text with --data" in gone.err
    learned = program(*EVAL, "--data", moved)
    assert "to evaluate the held-out part, put the text back to" in learned.err
    moved.rename(text)
    assert "without --data the held-out part is evaluated" in program(*EVAL, "--data", text).err
    assert program(*EVAL).out == expected
