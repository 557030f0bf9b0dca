"""Prepared data that is damaged is noticed, and hashed no more often than it changes."""

import json
import os
import re
from pathlib import Path

import pytest

from gptforge import files
from gptforge.data.cache import prepare_cached
from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    VERIFIED_FILE,
    find_corruption,
    read_index,
)
from gptforge.data.prepare.pipeline import REQUEST_FILE, prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import UserError

SHARD = "train_000000.bin"


@pytest.fixture
def cached(play, tmp_path, monkeypatch):
    """Prepare the play in a cache of its own; gives the folder and the lines that were said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def open_again() -> tuple[Path, list[str]]:
        said: list[str] = []
        index, _ = prepare_cached(
            play.as_posix(), tokenizer="char", val_fraction=0.1, form=TextFormat(), log=said.append
        )
        return index.folder, said

    return open_again


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def other_alphabet(path: Path) -> None:
    record = json.loads(path.read_text())
    record["alphabet"] = "".join(sorted(set(record["alphabet"][:-1]) | {"\u00e9"}))
    path.write_text(json.dumps(record))


DAMAGE = {
    "flipped byte": (lambda f: flip(f / SHARD, 2000), f"{SHARD} is not what {INDEX_FILE} says"),
    "truncated shard": (lambda f: os.truncate(f / SHARD, 1500), f"{SHARD} is not what"),
    "missing shard": (lambda f: (f / SHARD).unlink(), "No such file"),
    "shard is a folder": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
        "not a regular file",
    ),
    "other tokenizer": (
        lambda f: other_alphabet(f / TOKENIZER_FILE),
        f"{TOKENIZER_FILE} is not what",
    ),
    "missing tokenizer": (
        lambda f: (f / TOKENIZER_FILE).unlink(),
        f"{TOKENIZER_FILE}: No such file",
    ),
    "truncated index": (lambda f: os.truncate(f / INDEX_FILE, 100), "not a readable index"),
    "changed index": (
        lambda f: flip(f / INDEX_FILE, (f / INDEX_FILE).read_text().index("fraction")),
        INDEX_FILE,
    ),
    "missing index": (lambda f: (f / INDEX_FILE).unlink(), f"{INDEX_FILE} is missing"),
    "missing request": (lambda f: (f / REQUEST_FILE).unlink(), f"{REQUEST_FILE} is missing"),
    "binary request": (
        lambda f: (f / REQUEST_FILE).write_bytes(b"\xff\0"),
        f"{REQUEST_FILE} is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_prepared_again_and_says_so(cached, kind) -> None:
    folder, said = cached()
    assert not any("again" in line for line in said)
    names = (SHARD, TOKENIZER_FILE, INDEX_FILE)
    whole = {name: (folder / name).read_bytes() for name in names}
    damage, words = DAMAGE[kind]
    damage(folder)
    folder, said = cached()
    (line,) = [line for line in said if "prepared again" in line]
    assert words in line
    assert {name: (folder / name).read_bytes() for name in names} == whole
    assert not any("again" in line for line in cached()[1])


def test_a_file_in_the_place_of_the_cached_folder_is_replaced(cached) -> None:
    folder, _ = cached()
    files.remove(folder)
    folder.write_text("in the way")
    assert read_index(cached()[0]) is not None


def test_intact_shards_are_hashed_only_after_they_changed(cached, monkeypatch) -> None:
    folder, _ = cached()
    hashed: list[str] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or real(path))
    cached()
    assert SHARD not in hashed
    os.utime(folder / SHARD)
    cached()
    cached()
    assert hashed.count(SHARD) == 1


def test_a_cache_without_a_stamp_is_verified_and_gets_one(cached) -> None:
    folder, _ = cached()
    (folder / VERIFIED_FILE).unlink()
    assert cached()[1] == []
    assert (folder / VERIFIED_FILE).is_file()
    (folder / VERIFIED_FILE).unlink()
    other_alphabet(folder / TOKENIZER_FILE)
    assert f"{TOKENIZER_FILE} is not the one" in cached()[1][0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"index.json": 3}', "null"])
def test_a_stamp_that_is_no_stamp_is_no_stamp(cached, text) -> None:
    folder, _ = cached()
    (folder / VERIFIED_FILE).write_text(text)
    assert cached()[1] == []
    flip(folder / SHARD, 2000)
    (folder / VERIFIED_FILE).write_text(text)
    assert "prepared again" in cached()[1][0]


@pytest.mark.parametrize("headerless", [False, True])
def test_damage_in_a_prepared_folder_stops_training_and_is_mended_by_preparing(
    play, tmp_path, headerless
) -> None:
    out, request = tmp_path / "data", PrepareRequest((play.as_posix(),), raw_bin=headerless)
    prepare(out, request)
    name = "train.bin" if headerless else SHARD
    whole = (out / name).read_bytes()
    flip(out / name, 1500)
    with pytest.raises(UserError, match=f"{re.escape(name)} is not what .* given again, makes it"):
        open_dataset(out, DatasetOptions(), log=print)
    said: list[str] = []
    prepare(out, request, log=said.append)
    assert any("prepared again" in line for line in said)
    assert (out / name).read_bytes() == whole
    open_dataset(out, DatasetOptions(), log=print)


def test_another_tokenizer_beside_prepared_shards_is_refused(play, tmp_path) -> None:
    out = tmp_path / "data"
    prepare(out, PrepareRequest((play.as_posix(),), tokenizer="char"))
    (out / VERIFIED_FILE).unlink()
    other_alphabet(out / TOKENIZER_FILE)
    with pytest.raises(UserError, match="not the one that the shards were made with"):
        open_dataset(out, DatasetOptions(), log=print)


def test_more_than_the_limit_is_not_hashed(play, tmp_path) -> None:
    index = prepare(tmp_path / "data", PrepareRequest((play.as_posix(),), tokenizer="char"))
    flip(index.folder / SHARD, 2000)
    assert find_corruption(index, max_hash_bytes=10) is None
    assert SHARD in str(find_corruption(index, max_hash_bytes=10**6))
    other_alphabet(index.folder / TOKENIZER_FILE)
    assert TOKENIZER_FILE in str(find_corruption(index, max_hash_bytes=10))


def test_a_shard_of_an_unfinished_preparation_is_made_again_if_it_changed(
    tmp_path, monkeypatch
) -> None:
    source = tmp_path / "t.txt"
    source.write_text("".join(f"line {i} of many\n" for i in range(2000)))
    request = PrepareRequest((source.as_posix(),), tokenizer="byte", shard_bytes=4096)

    def stop(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    whole = prepare(tmp_path / "whole", request)
    monkeypatch.setattr("gptforge.data.prepare.pipeline.finish", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", request)
    monkeypatch.undo()
    flip(tmp_path / "data" / SHARD, 1500)
    index = prepare(tmp_path / "data", request)
    assert index.digest == whole.digest
    assert (index.folder / SHARD).read_bytes() == (whole.folder / SHARD).read_bytes()
    assert find_corruption(index) is None
