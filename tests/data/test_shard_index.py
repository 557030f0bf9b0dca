"""Corrupt prepared data is detected, and files are hashed only after they changed."""

import json
import os
import re
from pathlib import Path

import pytest

from gptforge import files
from gptforge.data.cache import prepare_cached
from gptforge.data.dataset import DatasetOptions, open_dataset
from gptforge.data.prepare.pipeline import REQUEST_FILE, prepare
from gptforge.data.prepare.request import PrepareRequest
from gptforge.data.shard_index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    VERIFIED_FILE,
    find_corruption,
    read_index,
)
from gptforge.errors import UserError
from gptforge.report.log_handler import log_to

SHARD = "train_000000.bin"


@pytest.fixture
def prepare_play(play, tmp_path, monkeypatch):
    """Prepare the play in an empty cache; returns the folder and the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run() -> tuple[Path, list[str]]:
        log: list[str] = []
        with log_to(log.append):
            index, _ = prepare_cached(PrepareRequest((play.as_posix(),), tokenizer="char"))
        return index.folder, log

    return run


def flip_byte(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)
    make_newer(path)


def make_newer(path: Path) -> None:
    """Give a file a later time: some systems count it in steps longer than a test takes."""
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


def change_alphabet(path: Path) -> None:
    record = json.loads(path.read_text())
    record["alphabet"] = "".join(sorted(set(record["alphabet"][:-1]) | {"\u00e9"}))
    path.write_text(json.dumps(record))


CORRUPTIONS = {
    "flipped byte": (
        lambda f: flip_byte(f / SHARD, 2000),
        f"{SHARD} is not what {INDEX_FILE} says",
    ),
    "truncated shard": (lambda f: os.truncate(f / SHARD, 1500), f"{SHARD} is not what"),
    "missing shard": (lambda f: (f / SHARD).unlink(), "No such file"),
    "shard is a folder": (
        lambda f: ((f / SHARD).unlink(), (f / SHARD).mkdir()),
        "not a regular file",
    ),
    "other tokenizer": (
        lambda f: change_alphabet(f / TOKENIZER_FILE),
        f"{TOKENIZER_FILE} is not what",
    ),
    "missing tokenizer": (
        lambda f: (f / TOKENIZER_FILE).unlink(),
        f"{TOKENIZER_FILE}: No such file",
    ),
    "truncated index": (lambda f: os.truncate(f / INDEX_FILE, 100), "not a readable index"),
    "changed index": (
        lambda f: flip_byte(f / INDEX_FILE, (f / INDEX_FILE).read_text().index("fraction")),
        INDEX_FILE,
    ),
    "missing index": (lambda f: (f / INDEX_FILE).unlink(), f"{INDEX_FILE} is missing"),
    "missing request": (lambda f: (f / REQUEST_FILE).unlink(), f"{REQUEST_FILE} is missing"),
    "binary request": (
        lambda f: (f / REQUEST_FILE).write_bytes(b"\xff\0"),
        f"{REQUEST_FILE} is missing",
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupt_cache_is_prepared_again(prepare_play, kind) -> None:
    folder, log = prepare_play()
    assert not any("again" in line for line in log)
    names = (SHARD, TOKENIZER_FILE, INDEX_FILE)
    intact = {name: (folder / name).read_bytes() for name in names}
    corrupt, message = CORRUPTIONS[kind]
    corrupt(folder)
    folder, log = prepare_play()
    (line,) = [line for line in log if "prepared again" in line]
    assert message in line
    assert {name: (folder / name).read_bytes() for name in names} == intact
    assert not any("again" in line for line in prepare_play()[1])


def test_file_in_place_of_cache_folder_is_replaced(prepare_play) -> None:
    folder, _ = prepare_play()
    files.remove(folder)
    folder.write_text("in the way")
    assert read_index(prepare_play()[0]) is not None


def test_intact_shards_are_hashed_only_after_a_change(prepare_play, monkeypatch) -> None:
    folder, _ = prepare_play()
    hashed: list[str] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    prepare_play()
    assert SHARD not in hashed
    make_newer(folder / SHARD)
    prepare_play()
    prepare_play()
    assert hashed.count(SHARD) == 1


def test_cache_without_verified_file_is_verified(prepare_play) -> None:
    folder, _ = prepare_play()
    (folder / VERIFIED_FILE).unlink()
    assert prepare_play()[1] == []
    assert (folder / VERIFIED_FILE).is_file()
    (folder / VERIFIED_FILE).unlink()
    change_alphabet(folder / TOKENIZER_FILE)
    assert f"{TOKENIZER_FILE} is not the one" in prepare_play()[1][0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"index.json": 3}', "null"])
def test_invalid_verified_file_is_ignored(prepare_play, text) -> None:
    folder, _ = prepare_play()
    (folder / VERIFIED_FILE).write_text(text)
    assert prepare_play()[1] == []
    flip_byte(folder / SHARD, 2000)
    (folder / VERIFIED_FILE).write_text(text)
    assert "prepared again" in prepare_play()[1][0]


@pytest.mark.parametrize("raw_bin", [False, True])
def test_corrupt_folder_stops_training_and_preparing_fixes_it(
    play, tmp_path, raw_bin, messages
) -> None:
    out, request = tmp_path / "data", PrepareRequest((play.as_posix(),), raw_bin=raw_bin)
    prepare(out, request)
    name = "train.bin" if raw_bin else SHARD
    intact = (out / name).read_bytes()
    flip_byte(out / name, 1500)
    with pytest.raises(UserError, match=f"{re.escape(name)} is not what index.json says"):
        open_dataset(out, DatasetOptions())
    prepare(out, request)
    assert any("prepared again" in line for line in messages)
    assert (out / name).read_bytes() == intact
    open_dataset(out, DatasetOptions())


def test_other_tokenizer_beside_prepared_shards_is_refused(play, tmp_path) -> None:
    out = tmp_path / "data"
    prepare(out, PrepareRequest((play.as_posix(),), tokenizer="char"))
    (out / VERIFIED_FILE).unlink()
    change_alphabet(out / TOKENIZER_FILE)
    with pytest.raises(UserError, match="not the one that the shards were made with"):
        open_dataset(out, DatasetOptions())


def test_more_than_max_hash_bytes_is_not_hashed(play, tmp_path) -> None:
    index = prepare(tmp_path / "data", PrepareRequest((play.as_posix(),), tokenizer="char"))
    flip_byte(index.folder / SHARD, 2000)
    assert find_corruption(index, max_hash_bytes=10) is None
    assert SHARD in str(find_corruption(index, max_hash_bytes=10**6))
    change_alphabet(index.folder / TOKENIZER_FILE)
    assert TOKENIZER_FILE in str(find_corruption(index, max_hash_bytes=10))


def test_corrupt_shard_of_unfinished_preparation_is_written_again(tmp_path, monkeypatch) -> None:
    source = tmp_path / "t.txt"
    source.write_text("".join(f"line {i} of many\n" for i in range(2000)))
    request = PrepareRequest((source.as_posix(),), tokenizer="byte", shard_bytes=4096)

    def interrupt(*args, **kwargs) -> None:
        raise KeyboardInterrupt

    complete = prepare(tmp_path / "complete", request)
    monkeypatch.setattr("gptforge.data.prepare.pipeline.finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", request)
    monkeypatch.undo()
    flip_byte(tmp_path / "data" / SHARD, 1500)
    index = prepare(tmp_path / "data", request)
    assert index.record["digest"] == complete.record["digest"]
    assert (index.folder / SHARD).read_bytes() == (complete.folder / SHARD).read_bytes()
    assert find_corruption(index) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "gptforge-shards", "version": 2}',
        '{"format": "gptforge-shards", "version": 1, "split": {"fraction": 0.1}, "shards": '
        '[{"file": "../../etc/passwd", "split": "train", "tokens": 1}]}',
        '{"format": "gptforge-shards", "version": 1, "split": {"fraction": 0.1}, "shards": '
        '[{"file": "a.bin", "split": "train", "tokens": -1}]}',
        "[" * 100_000,
    ],
)
def test_invalid_index_is_refused(tmp_path, text) -> None:
    (tmp_path / "index.json").write_text(text)
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable index"):
        read_index(tmp_path)


def test_index_of_another_program_does_not_make_shards_of_texts(tmp_path) -> None:
    (tmp_path / "index.json").write_text('{"pages": []}')
    assert read_index(tmp_path) is None
    (tmp_path / "train.bin").write_bytes(b"")
    with pytest.raises(UserError, match="not a readable index"):
        read_index(tmp_path)
