"""Named splits in preparation, training and other programs' shards."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from gptforge.data.dataset import Dataset, DatasetOptions, open_dataset
from gptforge.data.prepare.request import PrepareRequest, read_ends
from gptforge.data.token_dataset import ShardWriter, read_shard_header
from gptforge.errors import UserError
from tests.data.prepare.small_datasets import (
    prepare_files,
    some_text,
    texts_of,
    tokens_of,
    write_jsonl,
    write_parquet,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "d"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", [some_text(i) for i in range(150)])
    (folder / "validation.txt").write_text(some_text(1000), encoding="utf-8")
    (folder / "test.txt").write_text(some_text(2000), encoding="utf-8")
    return folder


def open_input(path: Path, **options) -> Dataset:
    return open_dataset(path, DatasetOptions(**options))


def write_shard(path: Path, ids: range) -> None:
    writer = ShardWriter(path, np.dtype(np.uint16))
    writer.write(np.array(ids, np.uint16))
    writer.close()


def test_prepare_holds_out_validation_and_ignores_test(folder, tmp_path) -> None:
    index = prepare_files(tmp_path / "out", folder)
    assert texts_of(index, "val") == [some_text(1000)]
    assert texts_of(index, "train") == [some_text(i) for i in range(150)]
    mixture = prepare_files(tmp_path / "mixture", folder, split_by_name=False)
    assert mixture.total("train", "documents") + mixture.total("val", "documents") == 152
    assert texts_of(mixture, "val") != [some_text(1000)]


def test_small_shards_and_several_workers_hold_out_the_same(tmp_path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.txt").write_text(" ".join(some_text(i) for i in range(200)), "utf-8")
    (folder / "val.txt").write_text(" ".join(some_text(i) for i in range(300, 350)), "utf-8")
    write_parquet(folder / "train.parquet", [some_text(i) for i in range(400, 420)])
    one = prepare_files(tmp_path / "one", folder)
    many = prepare_files(tmp_path / "many", folder, shard_bytes=3000, num_workers=2)
    for split in ("train", "val"):
        assert tokens_of(one, split) == tokens_of(many, split)
    assert one.total("val", "bytes") == (folder / "val.txt").stat().st_size


def test_listed_files_and_patterns_are_split_as_well(folder, tmp_path) -> None:
    listed = [folder / name for name in ("train-0.jsonl", "validation.txt", "test.txt")]
    assert texts_of(prepare_files(tmp_path / "1", *listed), "val") == [some_text(1000)]
    assert texts_of(prepare_files(tmp_path / "2", folder / "*"), "val") == [some_text(1000)]


def test_without_val_fraction_validation_files_are_ignored(folder) -> None:
    dataset = open_input(folder, val_fraction=0.0, tokenizer="byte")
    assert (dataset.documents, len(dataset.val)) == (150, 0)
    assert any("left out, since nothing is held out: " in notice for notice in dataset.notices)


def test_validation_file_without_text_is_refused(folder, tmp_path) -> None:
    (folder / "validation.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"validation.txt: there is no text.*held out by name"):
        prepare_files(tmp_path / "out", folder)
    index = prepare_files(tmp_path / "out", folder, split_by_name=False)
    assert index.total("val", "tokens")


def test_cache_distinguishes_names(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for name, seed in (("train.txt", 1), ("x.txt", 2), ("y.txt", 3)):
        (tmp_path / "a" / name).write_text(some_text(seed), "utf-8")
    before = open_input(tmp_path / "a", tokenizer="byte")
    (tmp_path / "a" / "x.txt").rename(tmp_path / "a" / "val.txt")
    after = open_input(tmp_path / "a", tokenizer="byte")
    assert before.sha256 != after.sha256
    assert len(after.val) == len(some_text(2).encode()) + 1


def test_training_prints_held_out_and_ignored_files(program, folder) -> None:
    options = ("--preset=debug", "--max_steps=1", "--context_length=16", "--device=cpu")
    done = program("--input", "d", *options)
    assert done.code == 0
    note = "held out as named: d/validation.txt; left out as named: d/test.txt"
    lines = [line for line in (done.out + done.err).splitlines() if note in line]
    assert len(lines) == 1
    assert "--split_by_name false" in lines[0]
    prepared = program("prepare", "d", "--out", "out")
    assert f"note: {note}" in prepared.err
    unused = "note: --val_fraction has no effect: files are held out by their names"
    assert unused not in done.out + prepared.err
    done = program("--input", "d", "--val_fraction=0.2", "--restart", *options)
    assert (done.code, done.out.count(unused)) == (0, 1)
    assert "of 1 document held out" in prepared.out


def test_other_programs_shards_are_split_by_words(tmp_path) -> None:
    write_shard(tmp_path / "fineweb_train_000001.bin", range(100))
    write_shard(tmp_path / "medieval_000.bin", range(200, 230))
    write_shard(tmp_path / "fineweb_val_000000.bin", range(50, 90))
    write_shard(tmp_path / "fineweb_test_000000.bin", range(5))
    dataset = open_input(tmp_path)
    np.testing.assert_array_equal(dataset.train[:], [*range(100), *range(200, 230)])
    np.testing.assert_array_equal(dataset.val[:], range(50, 90))
    assert any(notice.startswith("1 shard") and "test" in notice for notice in dataset.notices)
    assert not any("--val_fraction" in notice for notice in dataset.notices)
    notices = open_input(tmp_path, val_fraction=0.2).notices
    assert any("--val_fraction has no effect" in notice for notice in notices)


def test_shards_that_version_0_1_held_out_are_other_data(tmp_path) -> None:
    """It looked for val anywhere in a name; its runs must not resume with another split."""
    for folder, name in (("a", "medieval.bin"), ("b", "more.bin")):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "train.bin", range(100))
        write_shard(tmp_path / folder / name, range(30))
    for folder, is_same in (("a", False), ("b", True)):
        shards = [read_shard_header(path) for path in sorted((tmp_path / folder).iterdir())]
        digest = hashlib.sha256()
        for shard in shards:
            digest.update(
                f"{shard.path.name} {shard.num_tokens}\n".encode() + read_ends(shard.path)
            )
        assert (open_input(tmp_path / folder).sha256 == digest.hexdigest()) is is_same


def test_names_without_such_words_change_nothing(tmp_path) -> None:
    (tmp_path / "a.txt").write_text(some_text(1), "utf-8")
    assert PrepareRequest((str(tmp_path),)).split_by_name
    index = prepare_files(tmp_path / "out", tmp_path / "a.txt")
    assert index.record["split"]["rule"] == "character"
