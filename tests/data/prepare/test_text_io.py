"""Reading in small blocks: what is found does not depend on where they end."""

import pytest

from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.job import last_safe_cut
from gptforge.data.prepare.readers import read_documents
from gptforge.data.prepare.scan import byte_offset, scan_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import BOM, TextFormat, read_blocks

MARK = "<|endoftext|>"


@pytest.mark.parametrize("block", [1, 5, 13, 50, 10**6])
def test_a_mark_between_documents_is_found_wherever_a_block_ends(
    tmp_path, monkeypatch, block
) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK", block)
    text = f"naïve{MARK}<|endof<{MARK}|>\n{MARK}{MARK}日本 {MARK[:-1]}\nend{MARK}last<|"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    (source,) = find_sources([str(tmp_path / "t.txt")])
    found = [
        d.text for d in read_documents(source, TextFormat(split_on=MARK), BadInputHandler(False))
    ]
    wanted = [part.strip("\n") for part in text.split(MARK)]
    assert found == [part for part in wanted if part]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_character_is_found_by_few_places_of_a_long_text(tmp_path, monkeypatch, ending) -> None:
    monkeypatch.setattr("gptforge.data.prepare.text_io.BLOCK", 7)
    monkeypatch.setattr("gptforge.data.prepare.scan.STEP", 100)
    text = "to be, 日本\n\nnaïve or not 🙂\n" * 50
    raw = (BOM + text.replace("\n", ending)).encode()
    (tmp_path / "t.txt").write_bytes(raw)
    (source,) = find_sources([str(tmp_path / "t.txt")])
    facts = scan_text(source, "utf-8")
    # All blocks of a large file would be a memory of their own.
    assert len(raw) // 120 < len(facts.offsets) < len(raw) // 80
    for place in range(1, len(text)):
        before = (BOM + text[:place].replace("\n", ending)).encode()
        assert byte_offset(source, facts, place) == len(before)


def test_the_last_cleft_is_looked_for_in_what_is_new_alone() -> None:
    text = "one two" + "-" * 10_000
    assert last_safe_cut(text) == 3
    assert last_safe_cut(text, 3) == 3
    assert last_safe_cut(text, 4) is None
    # A blank at the old end becomes a cleft by what follows it.
    assert last_safe_cut("one ", 1) is None
    assert last_safe_cut("one two", len("one ") - 1) == 3


def test_what_a_few_packed_bytes_stand_for_is_handed_out_whole(tmp_path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = b"the same again and again\n" * 40_000
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(text) + zstandard.compress(b"end"))
    (source,) = find_sources([str(tmp_path / "t.txt.zst")])
    found = [block for block, _ in read_blocks(source)]
    assert b"".join(found) == text + b"end"
    assert len(set(map(len, found[:-1]))) == 1
