"""Splits that files already have by their names, in prepare, training and shards of others."""

from pathlib import Path

import numpy as np
import pytest

from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.split import split_by_name
from gptforge.errors import UserError
from tests.data.test_dataset import write_shard as shard
from tests.data.test_prepare import jsonl, made, parquet, some_text, stream, texts_of


@pytest.mark.parametrize(
    ("names", "val", "test"),
    [
        (["train.txt", "valid.txt", "test.txt"], [1], [2]),
        (["train/a.txt", "validation/b.txt", "test/c.txt", "train/d.txt"], [1], [2]),
        (["d-train-00000-of-00002.parquet", "d-validation-00000-of-00001.parquet"], [1], []),
        (["TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"], [1], []),
        (["wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"], [1], [2]),
        (["Train.jsonl.gz", "VAL_2.jsonl.gz"], [1], []),
        (["en/train.txt", "en/dev.txt", "fr/train.txt", "fr/dev.txt", "notes.txt"], [1, 3], []),
        (["train/a.txt", "train/val_1.txt", "train/b.txt", "val/train_1.txt"], [1], []),
        (["training/a.txt", "dev/b.txt"], [1], []),
        # Words only, and only if a name says train.
        (["train_0.txt", "medieval_0.txt", "development_notes.txt", "contest.txt"], [], []),
        (["restrain.txt", "valid.txt"], [], []),
        (["a.txt", "dev_notes.txt", "test.txt"], [], []),
        (["train.txt", "train_test.txt"], [], []),
        (["val.txt"], [], []),
    ],
)
def test_names_say_which_files_are_held_out_and_which_are_left_out(names, val, test) -> None:
    found = split_by_name([Path("/home/me/dev/test", name) for name in names])
    assert (list(found.val), list(found.test)) == (val, test)


def test_folders_above_all_files_say_nothing() -> None:
    assert not split_by_name([Path("x/train/val/a.txt"), Path("x/train/val/b.txt")])
    found = split_by_name([Path("x/train/val/train.txt"), Path("x/train/val/b.txt")])
    assert not found


def folder_of(tmp_path: Path) -> Path:
    folder = tmp_path / "d"
    folder.mkdir()
    jsonl(folder / "train-0.jsonl", [some_text(i) for i in range(150)])
    (folder / "validation.txt").write_text(some_text(1000), encoding="utf-8")
    (folder / "test.txt").write_text(some_text(2000), encoding="utf-8")
    return folder


def test_prepare_holds_out_what_says_validation_and_leaves_test_out(tmp_path) -> None:
    folder = folder_of(tmp_path)
    index = made(tmp_path / "out", folder)
    assert texts_of(index, "val") == [some_text(1000)]
    assert texts_of(index, "train") == [some_text(i) for i in range(150)]
    mixed = made(tmp_path / "mixed", folder, split_by_name=False)
    assert mixed.total("train", "documents") + mixed.total("val", "documents") == 152
    assert texts_of(mixed, "val") != [some_text(1000)]


def test_small_shards_and_several_processes_hold_out_the_same(tmp_path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.txt").write_text(" ".join(some_text(i) for i in range(200)), "utf-8")
    (folder / "val.txt").write_text(" ".join(some_text(i) for i in range(300, 350)), "utf-8")
    parquet(folder / "train.parquet", [some_text(i) for i in range(400, 420)])
    one = made(tmp_path / "one", folder)
    many = made(tmp_path / "many", folder, shard_bytes=3000, workers=2)
    for side in ("train", "val"):
        assert stream(one, side) == stream(many, side)
    assert one.total("val", "bytes") == (folder / "val.txt").stat().st_size


def test_files_named_one_by_one_and_by_a_pattern_are_told_apart_as_well(tmp_path) -> None:
    folder = folder_of(tmp_path)
    listed = [folder / name for name in ("train-0.jsonl", "validation.txt", "test.txt")]
    assert texts_of(made(tmp_path / "1", *listed), "val") == [some_text(1000)]
    assert texts_of(made(tmp_path / "2", folder / "*"), "val") == [some_text(1000)]


def test_where_nothing_is_held_out_such_files_are_left_out(tmp_path) -> None:
    said: list[str] = []
    wanted = DatasetOptions(val_fraction=0.0, tokenizer="byte")
    corpus = open_dataset(folder_of(tmp_path), wanted, log=said.append)
    assert (corpus.documents, len(corpus.val)) == (150, 0)
    assert any("left out, since nothing is held out: " in notice for notice in corpus.notices)


def test_a_held_out_file_without_text_is_refused(tmp_path) -> None:
    folder = folder_of(tmp_path)
    (folder / "validation.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"validation.txt: empty: .*held out by their names"):
        made(tmp_path / "out", folder)
    assert made(tmp_path / "out", folder, split_by_name=False).total("val", "tokens")


def test_the_cache_tells_names_apart(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for name, seed in (("train.txt", 1), ("x.txt", 2), ("y.txt", 3)):
        (tmp_path / "a" / name).write_text(some_text(seed), "utf-8")
    wanted = DatasetOptions(tokenizer="byte")
    before = open_dataset(tmp_path / "a", wanted, log=lambda text: None)
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "val.txt")
    after = open_dataset(tmp_path / "a", wanted, log=lambda text: None)
    assert before.sha256 != after.sha256
    assert len(after.val) == len(some_text(2).encode()) + 1


def test_training_says_what_was_held_out_and_what_was_left_out(program, tmp_path) -> None:
    folder_of(tmp_path)
    options = ("--preset=debug", "--max_steps=1", "--context_length=16", "--device=cpu")
    done = program("--input", "d", *options)
    assert done.code == 0
    held_out = "held out as named: d/validation.txt; left out as named: d/test.txt"
    lines = [line for line in (done.out + done.err).splitlines() if held_out in line]
    assert len(lines) == 1
    assert "--split_by_name false" in lines[0]
    prepared = program("prepare", "d", "--out", "out")
    assert f"note: {held_out}" in prepared.err
    assert "of 1 document held out" in prepared.out


def test_shards_of_others_are_held_out_by_whole_words(tmp_path) -> None:
    shard(tmp_path / "fineweb_train_000001.bin", range(100))
    shard(tmp_path / "medieval_000.bin", range(200, 230))
    shard(tmp_path / "fineweb_val_000000.bin", range(50, 90))
    shard(tmp_path / "fineweb_test_000000.bin", range(5))
    made = open_dataset(tmp_path, DatasetOptions(), log=lambda text: None)
    np.testing.assert_array_equal(made.train[:], [*range(100), *range(200, 230)])
    np.testing.assert_array_equal(made.val[:], range(50, 90))
    assert "1 shard whose name says test: left out" in made.notices


def test_shards_that_are_no_longer_held_out_are_other_data(tmp_path) -> None:
    # Earlier versions looked for val anywhere in a name.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, name in (("a", "medieval.bin"), ("b", "medieva.bin")):
        shard(tmp_path / folder / "train.bin", range(100))
        shard(tmp_path / folder / name, range(30))
    made = [open_dataset(tmp_path / name, DatasetOptions(), log=lambda text: None) for name in "ab"]
    assert [len(corpus.train) for corpus in made] == [117, 117]
    assert made[0].sha256 != made[1].sha256


def test_a_request_without_such_names_is_as_before(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(some_text(1), "utf-8")
    assert PrepareRequest((str(tmp_path),)).split_by_name
    assert made(tmp_path / "out", tmp_path / "a.txt").record["split"]["rule"] == "character"
