"""Token shards: compatible with llm.c and modded-nanogpt, safe whatever the file contains."""

import errno
import hashlib
import os
import resource
import struct
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge import files
from gptforge.data import token_dataset
from gptforge.data.token_dataset import (
    MAX_OPEN_SHARDS,
    ShardDataset,
    ShardFile,
    ShardWriter,
    cut_shards,
    find_documents,
    read_raw_bin,
    read_shard_header,
)
from gptforge.errors import UserError


def make_header(magic: int, version: int, count: int) -> bytes:
    """llm.c's header: 256 int32."""
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_both_formats_byte_by_byte(tmp_path, magic, version, dtype) -> None:
    ids = np.array([0, 1, 50256, 65535], dtype)
    raw = make_header(magic, version, 4) + ids.tobytes()
    (tmp_path / "a.bin").write_bytes(raw)
    shard = read_shard_header(tmp_path / "a.bin")
    assert (shard.dtype, shard.num_tokens, shard.offset) == (np.dtype(dtype), 4, 1024)
    assert ShardDataset([shard], vocab_size=2**16)[:].tolist() == ids.tolist()

    writer = ShardWriter(tmp_path / "b.bin", np.dtype(dtype))
    writer.write(ids[:1])
    writer.write(ids[1:])
    assert writer.close() == hashlib.sha256(raw).hexdigest()
    assert (tmp_path / "b.bin").read_bytes() == raw
    assert writer.num_tokens == 4


def test_modded_nanogpt_reads_a_written_shard(tmp_path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", np.dtype(np.uint16))
    writer.write(np.arange(1000, dtype=np.uint16))
    writer.close()
    # The lines of modded-nanogpt's and llm.c's loaders.
    with (tmp_path / "a.bin").open("rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert (header[0], header[1]) == (20240520, 1)
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert len(tokens) == header[2] == 1000
    assert tokens.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too few for a token shard's header"),
        (b"\0" * 1023, "too few for a token shard's header"),
        (b"\0" * 2048, "magic 0 and version 0"),
        (make_header(20240520, 7, 0), "magic 20240520 and version 7"),
        (make_header(20240520, 1, 10) + b"\0" * 19, "truncated: its header counts 10 tokens"),
        (make_header(20240520, 1, 10) + b"\0" * 21, "too long: its header counts 10 tokens"),
        (make_header(20240520, 1, -1), "too long"),
        (make_header(20240801, 7, 2**31 - 1), "truncated"),
    ],
)
def test_incomplete_shard_is_refused(tmp_path, content, words) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_shard_header(tmp_path / "a.bin")


@settings(max_examples=200)
@given(st.binary(max_size=3000))
def test_arbitrary_bytes_are_read_or_refused(tmp_path_factory, content) -> None:
    path = tmp_path_factory.mktemp("any") / "a.bin"
    path.write_bytes(content)
    for read in (read_shard_header, read_raw_bin):
        try:
            shard = read(path)
        except UserError:
            continue
        assert shard.offset + shard.num_tokens * shard.dtype.itemsize == len(content)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and their memory use")
def test_huge_shard_needs_no_memory(tmp_path) -> None:
    path = tmp_path / "a.bin"
    count = 2**31 - 1
    path.write_bytes(make_header(20240801, 7, count))
    with path.open("rb+") as file:
        file.truncate(1024 + 4 * count)  # 8 GB, sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = ShardDataset([read_shard_header(path)], vocab_size=10)
    assert len(tokens) == count
    assert tokens[count - 3 :].tolist() == [0, 0, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_aborted_writer_leaves_no_file(tmp_path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", np.dtype(np.uint16))
    writer.write(np.arange(10, dtype=np.uint16))
    assert not (tmp_path / "a.bin").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_writer_that_cannot_be_closed_leaves_no_file(tmp_path, monkeypatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "input/output error")

    (tmp_path / "a.bin").write_bytes(b"old")
    writer = ShardWriter(tmp_path / "a.bin", np.dtype(np.uint16))
    monkeypatch.setattr(files, "fsync", fail)
    with pytest.raises(OSError, match="input/output error") as error:
        writer.close()
    assert error.value.filename == (tmp_path / "a.bin").as_posix()
    writer.abort()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@given(st.data())
def test_slices_span_shards(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("many")
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    total = sum(lengths)
    expected = np.arange(total, dtype="<u2")
    shards, start = [], 0
    for i, length in enumerate(lengths):
        path = folder / f"{i}.bin"
        expected[start : start + length].tofile(path)
        shards.append(ShardFile(path, np.dtype("<u2"), length, 0))
        start += length
    first, last = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    tokens = ShardDataset(shards, vocab_size=10**6)
    np.testing.assert_array_equal(tokens[first:last], expected[first:last])
    begin, end = sorted(data.draw(st.tuples(st.integers(0, 200), st.integers(0, 200))))
    parts = (expected[:first], expected[first:])
    for cut, part in zip(cut_shards(shards, first), parts, strict=True):
        tokens = ShardDataset(cut, vocab_size=10**6)
        assert len(tokens) == len(part)
        np.testing.assert_array_equal(tokens[begin:end], part[begin:end])


def test_more_shards_than_file_handles(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(token_dataset, "MAX_IN_MEMORY_BYTES", 0)
    shards = []
    for i in range(MAX_OPEN_SHARDS + 50):
        path = tmp_path / f"{i:04d}.bin"
        np.array([i, i], "<u2").tofile(path)
        shards.append(ShardFile(path, np.dtype("<u2"), 2, 0))
    tokens = ShardDataset(shards, vocab_size=2**16)
    order = np.random.default_rng(0).permutation(len(shards))
    for i in [*order, *order]:
        assert tokens[2 * i : 2 * i + 2].tolist() == [i, i]
    assert tokens._reader.cache_info().currsize == MAX_OPEN_SHARDS
    if sys.platform == "linux":
        links = [entry.resolve() for entry in Path("/proc/self/fd").iterdir()]
        assert sum(link.parent == tmp_path for link in links) == MAX_OPEN_SHARDS


@pytest.mark.parametrize("in_memory_bytes", [0, token_dataset.MAX_IN_MEMORY_BYTES])
def test_shard_truncated_while_in_use(tmp_path, monkeypatch, in_memory_bytes) -> None:
    monkeypatch.setattr(token_dataset, "MAX_IN_MEMORY_BYTES", in_memory_bytes)
    path = tmp_path / "s.bin"
    np.arange(50_000, dtype="<u2").tofile(path)
    tokens = ShardDataset([ShardFile(path, np.dtype("<u2"), 50_000, 0)], vocab_size=2**16)
    assert tokens[40_000:40_002].tolist() == [40_000, 40_001]
    os.truncate(path, 20_000)
    if in_memory_bytes:
        assert tokens[40_000:40_002].tolist() == [40_000, 40_001]
        return
    assert tokens[9_998:10_000].tolist() == [9_998, 9_999]
    with pytest.raises(UserError, match=r"s\.bin: no longer readable: it was truncated while in"):
        tokens[9_999:10_001]


def test_reads_that_return_less_than_requested_are_continued(tmp_path, monkeypatch) -> None:
    """Some file systems do that, at a signal for instance; it must not look like a truncation."""
    monkeypatch.setattr(token_dataset, "MAX_IN_MEMORY_BYTES", 0)
    path = tmp_path / "s.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    shard = ShardFile(path, np.dtype("<u2"), 1000, 0)
    tokens = ShardDataset([shard], vocab_size=2**16)
    with path.open("rb", buffering=0) as file:
        short = mock.Mock(wraps=file)
        short.read.side_effect = lambda size: file.read(min(size, 7))
        monkeypatch.setattr(tokens._reader(shard), "_file", short)
        assert tokens[100:900].tolist() == list(range(100, 900))
        assert tokens[999:1000].tolist() == [999]


def test_shard_truncated_before_it_is_opened(tmp_path) -> None:
    path = tmp_path / "s.bin"
    np.arange(100, dtype="<u2").tofile(path)
    tokens = ShardDataset([ShardFile(path, np.dtype("<u2"), 100, 0)], vocab_size=2**16)
    os.truncate(path, 150)
    with pytest.raises(UserError, match=r"s\.bin: no longer readable: it is truncated"):
        tokens[0:10]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 2**20])
def test_documents_across_blocks(monkeypatch, block) -> None:
    monkeypatch.setattr(token_dataset, "BLOCK_TOKENS", block)
    tokens = np.array([8, 9, 1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 9, 9, 1, 2], np.uint16)
    documents = list(find_documents(tokens, 9))
    assert [(start, stop) for start, stop, _ in documents] == [(0, 1), (1, 7), (7, 13), (14, 17)]
    digests = [digest for _, _, digest in documents]
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3
    sha256 = hashlib.sha256(np.array([1, 2], "<u4")).digest()
    assert digests[3] == int.from_bytes(sha256[:8], "big")
    assert [(start, stop) for start, stop, _ in find_documents(tokens, None)] == [(0, 17)]
