"""Token shards: others' are read, ours are what others read, and nothing hostile gets through."""

import os
import resource
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.data import token_dataset as stream_module
from gptforge.data.prepare.split_writer import ShardWriter
from gptforge.data.token_dataset import (
    MAX_OPEN_SHARDS,
    ShardDataset,
    ShardFile,
    read_raw_bin,
    read_shard_header,
)
from gptforge.errors import UserError


def header(magic: int, version: int, count: int) -> bytes:
    """As llm.c documents it: 256 int32, of which three say something."""
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_both_forms_are_read_and_written_byte_by_byte(tmp_path, magic, version, dtype) -> None:
    ids = np.array([0, 1, 50256, 65535], dtype)
    theirs = header(magic, version, 4) + ids.tobytes()
    (tmp_path / "theirs.bin").write_bytes(theirs)
    found = read_shard_header(tmp_path / "theirs.bin")
    assert (found.dtype, found.num_tokens, found.offset) == (np.dtype(dtype), 4, 1024)
    assert ShardDataset([found], vocab_size=2**16)[:].tolist() == ids.tolist()

    writer = ShardWriter(tmp_path / "ours.bin", np.dtype(dtype))
    writer.write(ids[:1])
    writer.write(ids[1:])
    written = writer.close()
    assert (tmp_path / "ours.bin").read_bytes() == theirs
    assert (written.file, written.tokens, len(written.sha256)) == ("ours.bin", 4, 64)


def test_a_reader_written_after_the_documentation_reads_ours(tmp_path) -> None:
    # The lines of modded-nanogpt's and llm.c's loaders, in their own words: magic, version, count,
    # and then as many uint16 as that.
    writer = ShardWriter(tmp_path / "ours.bin", np.dtype(np.uint16))
    writer.write(np.arange(1000, dtype=np.uint16))
    writer.close()
    with (tmp_path / "ours.bin").open("rb") as file:
        head = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert (head[0], head[1]) == (20240520, 1)
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert len(tokens) == head[2] == 1000
    assert tokens.tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "too few for a token shard's header"),
        (b"\0" * 1023, "too few for a token shard's header"),
        (b"\0" * 2048, "magic 0 and version 0"),
        (header(20240520, 7, 0), "magic 20240520 and version 7"),
        (header(20240520, 1, 10) + b"\0" * 19, "truncated: its header counts 10 tokens"),
        (header(20240520, 1, 10) + b"\0" * 21, "longer than it should be"),
        (header(20240520, 1, -1), "longer than it should be"),
        (header(20240801, 7, 2**31 - 1), "truncated"),
    ],
)
def test_what_is_no_whole_shard_is_refused(tmp_path, content, words) -> None:
    (tmp_path / "s.bin").write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_shard_header(tmp_path / "s.bin")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=3000))
def test_no_bytes_whatever_do_more_than_be_refused(tmp_path_factory, content) -> None:
    path = tmp_path_factory.mktemp("any") / "s.bin"
    path.write_bytes(content)
    for read in (read_shard_header, read_raw_bin):
        try:
            shard = read(path)
        except UserError:
            continue
        assert shard.offset + shard.num_tokens * shard.dtype.itemsize == len(content)


@pytest.mark.skipif(sys.platform != "linux", reason="files with holes, and their memory")
def test_a_header_that_claims_gigabytes_costs_no_memory(tmp_path) -> None:
    path = tmp_path / "s.bin"
    count = 2**31 - 1
    path.write_bytes(header(20240801, 7, count))
    with path.open("rb+") as file:
        file.truncate(1024 + 4 * count)  # 8 GB, all of it a hole
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = ShardDataset([read_shard_header(path)], vocab_size=10)
    assert len(stream) == count
    assert stream[count - 3 :].tolist() == [0, 0, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_nothing_is_there_until_a_shard_is_whole(tmp_path) -> None:
    writer = ShardWriter(tmp_path / "s.bin", np.dtype(np.uint16))
    writer.write(np.arange(10, dtype=np.uint16))
    assert not (tmp_path / "s.bin").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(st.data())
def test_a_stream_over_many_shards_is_one_row_of_tokens(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("many")
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    total = sum(lengths)
    whole = np.arange(total, dtype="<u2")
    shards, at = [], 0
    for number, length in enumerate(lengths):
        path = folder / f"{number}.bin"
        whole[at : at + length].tofile(path)
        shards.append(ShardFile(path, np.dtype("<u2"), length, 0))
        at += length
    first, last = sorted(data.draw(st.tuples(st.integers(0, total), st.integers(0, total))))
    stream = ShardDataset(shards, vocab_size=10**6)
    np.testing.assert_array_equal(stream[first:last], whole[first:last])
    part = stream.subset(first, last)
    assert len(part) == last - first
    begin, end = sorted(data.draw(st.tuples(st.integers(0, 200), st.integers(0, 200))))
    np.testing.assert_array_equal(part[begin:end], whole[first:last][begin:end])


def test_more_shards_than_the_system_has_handles_are_no_matter(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stream_module, "MAX_IN_MEMORY_BYTES", 0)
    shards = []
    for number in range(MAX_OPEN_SHARDS + 50):
        path = tmp_path / f"{number:04d}.bin"
        np.array([number, number], "<u2").tofile(path)
        shards.append(ShardFile(path, np.dtype("<u2"), 2, 0))
    stream = ShardDataset(shards, vocab_size=2**16)
    order = np.random.default_rng(0).permutation(len(shards))
    for number in [*order, *order]:
        assert stream[2 * number : 2 * number + 2].tolist() == [number, number]
    assert len(stream._open) == MAX_OPEN_SHARDS
    assert sum(not file._file.closed for file in stream._open.values()) == MAX_OPEN_SHARDS


@pytest.mark.parametrize("in_memory", [0, stream_module.MAX_IN_MEMORY_BYTES])
def test_a_shard_that_is_truncated_while_it_is_read_is_an_error(
    tmp_path, monkeypatch, in_memory
) -> None:
    monkeypatch.setattr(stream_module, "MAX_IN_MEMORY_BYTES", in_memory)
    path = tmp_path / "s.bin"
    np.arange(50_000, dtype="<u2").tofile(path)
    stream = ShardDataset([ShardFile(path, np.dtype("<u2"), 50_000, 0)], vocab_size=2**16)
    assert stream[40_000:40_002].tolist() == [40_000, 40_001]
    os.truncate(path, 20_000)
    if in_memory:
        assert stream[40_000:40_002].tolist() == [40_000, 40_001]
        return
    assert stream[9_998:10_000].tolist() == [9_998, 9_999]
    with pytest.raises(UserError, match=r"s\.bin: cannot be read any more: it was truncated while"):
        stream[9_999:10_001]


def test_a_shard_that_was_truncated_before_it_is_opened_is_an_error(tmp_path) -> None:
    path = tmp_path / "s.bin"
    np.arange(100, dtype="<u2").tofile(path)
    stream = ShardDataset([ShardFile(path, np.dtype("<u2"), 100, 0)], vocab_size=2**16)
    os.truncate(path, 150)
    with pytest.raises(UserError, match=r"s\.bin: cannot be read any more: it is truncated"):
        stream[0:10]
