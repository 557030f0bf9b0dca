"""Results do not depend on where the blocks of a file end."""

import pytest

from gptforge.data.prepare import text_io
from gptforge.data.prepare.partition import byte_offset
from gptforge.data.prepare.readers import last_safe_cut, read_documents
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import BOM, InputPart, TextFormat, split_lines, text_stats
from gptforge.tokenizers.base import END_OF_TEXT as EOT


@pytest.mark.parametrize("block", [1, 5, 13, 50, 10**6])
def test_separator_across_blocks(tmp_path, monkeypatch, block) -> None:
    monkeypatch.setattr(text_io, "BLOCK_BYTES", block)
    text = f"naïve{EOT}<|endof<{EOT}|>\n{EOT}{EOT}日本 {EOT[:-1]}\nend{EOT}last<|"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    (source,) = find_sources([str(tmp_path / "t.txt")])
    documents = read_documents(InputPart(source, TextFormat(split_on=EOT)))
    expected = [part.strip("\n") for part in text.split(EOT)]
    assert [text for _, text in documents] == [part for part in expected if part]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_offset_of_every_character(tmp_path, monkeypatch, newline) -> None:
    monkeypatch.setattr(text_io, "BLOCK_BYTES", 7)
    monkeypatch.setattr(text_io, "OFFSET_STRIDE", 100)
    text = "to be, 日本\n\nnaïve or not 🙂\n" * 50
    raw = (BOM + text.replace("\n", newline)).encode()
    (tmp_path / "t.txt").write_bytes(raw)
    (source,) = find_sources([str(tmp_path / "t.txt")])
    stats = text_stats(InputPart(source).read_chunks())
    # The offsets of all blocks of a large file would need much memory.
    assert len(raw) // 120 < len(stats.offsets) < len(raw) // 80
    for i in range(1, len(text)):
        before = (BOM + text[:i].replace("\n", newline)).encode()
        assert byte_offset(source, stats, i) == len(before)


def test_last_safe_cut_searches_new_text_only() -> None:
    text = "one two" + "-" * 10_000
    assert last_safe_cut(text) == 3
    assert last_safe_cut(text, 3) == 3
    assert last_safe_cut(text, 4) is None
    # A space at the end becomes a safe cut by the text that follows it.
    assert last_safe_cut("one ", 1) is None
    assert last_safe_cut("one two", len("one ") - 1) == 3


def test_zstd_blocks_have_the_same_size(tmp_path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = b"the same again and again\n" * 40_000
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(text) + zstandard.compress(b"end"))
    (source,) = find_sources([str(tmp_path / "t.txt.zst")])
    blocks = list(InputPart(source).read_blocks())
    assert b"".join(blocks) == text + b"end"
    assert len(set(map(len, blocks[:-1]))) == 1


def test_zstd_with_a_long_window_is_read(tmp_path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    # As a stream: the size would make the window smaller.
    (tmp_path / "t.txt.zst").write_bytes(stream.compress(b"some text\n" * 9) + stream.flush())
    (source,) = find_sources([str(tmp_path / "t.txt.zst")])
    assert b"".join(InputPart(source).read_blocks()) == b"some text\n" * 9


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_split_lines_across_blocks(block) -> None:
    text = "a\n\nbc\nlast"
    parts = [text[i : i + block] for i in range(0, len(text), block)]
    assert list(split_lines(parts, "\n")) == text.splitlines(keepends=True)


def test_split_lines_bounds_memory(monkeypatch) -> None:
    monkeypatch.setattr(text_io, "MAX_LINE_LENGTH", 10)
    line, last = split_lines([b"x" * 4] * 1000 + [b"\nend"], b"\n")
    assert 10 < len(line) < 20
    assert last == b"end"
