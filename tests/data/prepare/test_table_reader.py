"""CSV and TSV files: the column of texts."""

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare import text_io
from gptforge.data.prepare.scan import iter_text
from gptforge.data.prepare.sources import find_sources
from gptforge.data.prepare.text_io import TextFormat


def read_texts(path: Path, *, skip: bool = False, **options) -> list[str]:
    (source,) = find_sources([str(path)])
    return list(iter_text(source, TextFormat(**options), BadInputHandler(skip)))


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
@pytest.mark.parametrize("block", [1, 7, 2**15])
def test_delimiters_and_quotes(tmp_path, monkeypatch, name, delimiter, block) -> None:
    rows = [["1", 'a "quoted", text;\twith all'], ["2", "two\nlines"], ["3", ""], ["4", "é"]]
    with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *rows])
    monkeypatch.setattr(text_io, "BLOCK_BYTES", block)
    assert read_texts(tmp_path / name) == [row[1] for row in rows if row[1]]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert read_texts(tmp_path / f"{name}.gz") == [row[1] for row in rows if row[1]]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), max_size=9))
def test_round_trip(tmp_path_factory, rows) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["n", "text"], *([1, r] for r in rows)])
    assert read_texts(path) == [row for row in rows if row.strip()]


def test_missing_column_lists_those_with_text(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("id,title,body,score\n1,One,Some words,0.5\n2,Two,More,1e-3\n")
    with pytest.raises(BadInputError, match=r"t.csv: no column 'text': it has title, body: choose"):
        read_texts(tmp_path / "t.csv")
    assert read_texts(tmp_path / "t.csv", field="body") == ["Some words", "More"]
    (tmp_path / "n.csv").write_text("x,y\n1,2\n")
    with pytest.raises(BadInputError, match=r"none of its fields \(x, y\) is text, or read"):
        read_texts(tmp_path / "n.csv")


def test_rows_of_another_length_are_refused_or_skipped(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n1,good\n2,not, quoted\n\n3,good too\n4\n")
    with pytest.raises(BadInputError, match=r"t.csv, line 3: 3 fields, and the first line names 2"):
        read_texts(tmp_path / "t.csv")
    assert read_texts(tmp_path / "t.csv", skip=True) == ["good", "good too"]


@pytest.mark.parametrize("rest", ['"never closed\nmore\n', '"closed"too early\n'])
def test_wrong_quotes(tmp_path, rest) -> None:
    (tmp_path / "t.csv").write_text(f"text,n\ngood,1\n{rest}")
    with pytest.raises(BadInputError, match=r"t.csv, line [34]: not CSV: .*--kind text"):
        read_texts(tmp_path / "t.csv")
    (source,) = find_sources([str(tmp_path / "t.csv")], kind="text")
    assert source.kind == "text"


@pytest.mark.parametrize("raw", ["", "\n", "text\n"])
def test_no_rows(tmp_path, raw) -> None:
    (tmp_path / "e.csv").write_text(raw)
    assert read_texts(tmp_path / "e.csv") == []


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("\ufefftext,n\na,1\n", encoding="utf-8")
    assert read_texts(tmp_path / "t.csv") == ["a"]


def test_undecodable_bytes(tmp_path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text\ncaf\xe9\n")
    with pytest.raises(BadInputError, match="not utf-8: byte 0xe9 at offset 8"):
        read_texts(tmp_path / "t.csv")
    assert read_texts(tmp_path / "t.csv", encoding="latin-1") == ["café"]


def test_training_reads_the_column_unless_kind_is_text(program) -> None:
    Path("t.csv").write_text("id,text\n" + "".join(f"7,words of row {i}\n" for i in range(200)))
    options = ("--preset=debug", "--max_steps=1", "--context_length=16", "--device=cpu")
    done = program("--input", "t.csv", *options, "--out_dir", "a")
    assert done.code == 0
    assert "in 200 documents" in done.out + done.err
    text = program("--input", "t.csv", "--kind", "text", *options, "--out_dir", "b")
    assert "documents" not in (text.out + text.err).split("text: ")[1].splitlines()[0]
