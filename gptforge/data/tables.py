"""The column of texts of a CSV or TSV file."""

import csv
from collections.abc import Iterator, Sequence
from itertools import islice

from gptforge.data.bad import BadInput, Skipped
from gptforge.data.fields import which_fields
from gptforge.data.reading import REPLACED, chunks
from gptforge.data.sources import Source

MAX_FIELD = 64 * 2**20
"""Characters of a field: an open quote must not take the rest of a large file into memory."""
DELIMITERS = ",;\t|"
PEEK = 20
"""Rows that are looked at to tell which columns hold text."""
AS_TEXT = "or read the file as plain text with --kind text"


def csv_texts(
    source: Source, field: str, encoding: str, skipped: Skipped
) -> Iterator[tuple[str, int]]:
    """The texts of a column, and how many bytes of the file were read up to each.

    The first line names the columns. A .tsv is delimited by tabs, any other file by whichever of
    , ; tab and | its first line has most of. Fields are quoted as RFC 4180 has it.
    """
    csv.field_size_limit(MAX_FIELD)
    lines = _Lines(source, encoding, skipped.notices)
    try:
        first = next(lines, "")
        rows = csv.reader(_before(first, lines), delimiter=_delimiter(first, source), strict=True)
        try:
            yield from _column(rows, field, source, skipped, lines)
        except csv.Error as error:
            where = f"{source.name}, line {lines.number}"
            what = f"not CSV: {error}"
            raise BadInput(what, where, f"correct the quotes, {AS_TEXT}") from None
    except BadInput as bad:
        skipped.add(bad)


def _column(
    rows: Iterator[list[str]], field: str, source: Source, skipped: Skipped, lines: "_Lines"
) -> Iterator[tuple[str, int]]:
    header = next(rows, [])
    if not header:
        return
    if field not in header:
        texts = _text_columns(header, list(islice(rows, PEEK)))
        raise BadInput(
            f"no column '{field}'", source.name, f"{which_fields(header, texts)}, {AS_TEXT}"
        )
    column = header.index(field)
    for row in rows:
        if len(row) == len(header):
            yield row[column], lines.reached
        elif row:
            where = f"{source.name}, line {lines.number}"
            what = f"{len(row)} fields, and the first line names {len(header)}"
            skipped.add(BadInput(what, where, f"put fields with a delimiter in quotes, {AS_TEXT}"))


def _text_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        name
        for column, name in enumerate(header)
        if any(column < len(row) and row[column] and not _is_number(row[column]) for row in rows)
    ]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _delimiter(first: str, source: Source) -> str:
    if ".tsv" in [suffix.lower() for suffix in source.path.suffixes[-2:]]:
        return "\t"
    return max(DELIMITERS, key=first.count)


def _before(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from lines


class _Lines(Iterator[str]):
    """The lines of a text, with their line feeds; knows how far it is."""

    def __init__(self, source: Source, encoding: str, notices: set[str]) -> None:
        self.number = self.reached = 0
        self._notices = notices
        self._lines = self._read(source, encoding)

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        return line

    def _read(self, source: Source, encoding: str) -> Iterator[str]:
        kept: list[str] = []
        length = 0
        for chunk in chunks(source, encoding=encoding):
            self.reached = chunk.reached
            if chunk.is_replaced:
                self._notices.add(f"{source.name}: {REPLACED}")
            first, feed, rest = chunk.text.partition("\n")
            kept.append(first + feed)
            length += len(first)
            if length > MAX_FIELD:
                what = f"a line longer than {MAX_FIELD // 2**20} MB"
                raise BadInput(what, f"{source.name}, line {self.number + 1}", AS_TEXT[3:])
            if not feed:
                continue
            yield "".join(kept)
            *whole, last = rest.split("\n")
            for line in whole:
                yield line + "\n"
            kept, length = [last], len(last)
        if length:
            yield "".join(kept)
