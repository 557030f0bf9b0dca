"""The column of texts of a CSV or TSV file."""

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from gptforge.data.input_errors import BadInput, BadInputError, BadInputHandler
from gptforge.data.prepare.json_reader import (
    CHAT_NOTICE,
    available_fields_hint,
    find_field,
    is_text,
    text_from_value,
)
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.text_io import (
    REPLACED_NOTICE,
    TextFormat,
    read_chunks,
)
from gptforge.errors import UserError, error_reason

MAX_CSV_FIELD_CHARS = 64 * 2**20
"""Characters of a field: an open quote must not take the rest of a large file into memory."""
DELIMITERS = ",;\t|"
PEEK_ROWS = 20
"""Rows that are looked at to tell which columns hold text."""
KIND_TEXT_HINT = "or read the file as plain text with --kind text"


def read_csv(
    source: Source, field: str, encoding: str, skipped: BadInputHandler
) -> Iterator[tuple[str, int]]:
    """The texts of a column, and how many bytes of the file were read up to each.

    The first line names the columns. A .tsv is delimited by tabs, any other file by whichever of
    , ; tab and | its first line has most of. Fields are quoted as RFC 4180 has it.
    """
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    lines = _Lines(source, encoding, skipped.notices)
    try:
        first = next(lines, "")
        rows = csv.reader(_prepend(first, lines), delimiter=_delimiter(first, source), strict=True)
        try:
            yield from _column(rows, field, source, skipped, lines)
        except csv.Error as error:
            where = f"{source.name}, line {lines.number}"
            what = f"not CSV: {error}"
            raise BadInput(what, where, f"correct the quotes, {KIND_TEXT_HINT}") from None
    except BadInput as bad:
        skipped.handle(bad)


def _column(
    rows: Iterator[list[str]], field: str, source: Source, skipped: BadInputHandler, lines: "_Lines"
) -> Iterator[tuple[str, int]]:
    header = next(rows, [])
    if not header:
        return
    if field not in header:
        texts = _text_columns(header, list(islice(rows, PEEK_ROWS)))
        raise BadInput(
            f"no column '{field}'",
            source.name,
            f"{available_fields_hint(header, texts)}, {KIND_TEXT_HINT}",
        )
    column = header.index(field)
    for row in rows:
        if len(row) == len(header):
            yield row[column], lines.reached
        elif row:
            where = f"{source.name}, line {lines.number}"
            what = f"{len(row)} fields, and the first line names {len(header)}"
            skipped.handle(
                BadInput(what, where, f"put fields with a delimiter in quotes, {KIND_TEXT_HINT}")
            )


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


def _prepend(first: str, lines: Iterator[str]) -> Iterator[str]:
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
        for chunk in read_chunks(source, encoding=encoding):
            self.reached = chunk.bytes_read
            if chunk.has_replacements:
                self._notices.add(f"{source.name}: {REPLACED_NOTICE}")
            first, feed, rest = chunk.text.partition("\n")
            kept.append(first + feed)
            length += len(first)
            if length > MAX_CSV_FIELD_CHARS:
                what = f"a line longer than {MAX_CSV_FIELD_CHARS // 2**20} MB"
                raise BadInput(what, f"{source.name}, line {self.number + 1}", KIND_TEXT_HINT[3:])
            if not feed:
                continue
            yield "".join(kept)
            *whole, last = rest.split("\n")
            for line in whole:
                yield line + "\n"
            kept, length = [last], len(last)
        if length:
            yield "".join(kept)


ROWS_PER_BATCH = 16
"""Parquet rows that are read at a time. Each may be a copy of one long text that is stored once."""
MAX_BATCH_BYTES = 2**28
"""What so many rows may take if each is as long as all of its row group."""
MAX_RATIO = 1000
"""Times its packed size that a large row group may unpack to; text unpacks to ten times at most."""


def open_parquet(source: Source, text_format: TextFormat) -> Any:
    """A Parquet file whose column of texts is there.

    Raises:
        BadInput: for a file that is none, or a column that is not there or not of text.
        UserError: if the package that reads it is missing.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source.name}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(source.path)
    except Exception as error:
        what = f"damaged Parquet file ({error_reason(error)})"
        raise BadInput(what, source.name, "fetch it again") from None
    schema = file.schema_arrow
    texts = [column.name for column in schema if _is_text_column(column.type)]
    found = find_field(schema.names, text_format.field)
    if not found:
        what = f"no column '{text_format.field}'"
        raise BadInput(what, source.name, available_fields_hint(schema.names, texts))
    if found not in texts:
        what = f"column '{found}' is no text but of type {schema.field(found).type}"
        raise BadInput(what, source.name, available_fields_hint(schema.names, texts))
    return file


def _is_text_column(kind: Any) -> bool:
    """Whether a column's values are strings, or chats."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        names = (
            {field.name for field in kind.value_type}
            if pa.types.is_struct(kind.value_type)
            else set()
        )
        return {"role", "content"} <= names or {"from", "value"} <= names
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def read_parquet(
    source: Source, form: TextFormat, skipped: BadInputHandler, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    try:
        file = open_parquet(source, form)
    except BadInput as bad:
        skipped.handle(bad)
        return
    column = find_field(file.schema_arrow.names, form.field)
    with file:
        groups = file.metadata.num_row_groups
        for group in range(start, groups if stop is None else stop):
            reached = source.size * (group + 1 - start) // max(1, groups)
            where = f"{source.name}, row group {group + 1} of {groups}"
            try:
                rows = rows_per_batch(file.metadata, group, column)
                # A row group may be gigabytes: it is taken by its pages.
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            skipped.handle(BadInput(f"'{column}' is null", where, "fill it in"))
                        elif is_text(text):
                            text, is_chat = text_from_value(text, column, "")
                            if is_chat:
                                skipped.notices.add(f"{source.name}: {CHAT_NOTICE}")
                            yield text, reached
                        else:
                            what = f"'{column}' is a chat with more than text"
                            skipped.handle(BadInput(what, where))
            except BadInput as bad:
                skipped.handle(BadInput(bad.problem, where, bad.hint))
            except BadInputError:
                raise
            except Exception as error:
                what = "damaged row group"
                remedy = f"fetch it again ({error_reason(error)})"
                skipped.handle(BadInput(what, where, remedy))


def rows_per_batch(metadata: Any, group: int, field: str) -> int:
    """How many rows fit into memory, whatever they are.

    A dictionary stores a text once for any number of rows: the size of the row group says how long
    its longest text may be, not how long all are together.

    Raises:
        BadInput: for a row group that unpacks to far more than any text does.
    """
    row_group = metadata.row_group(group)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    # A chat has several: messages.list.element.content and others.
    columns = [c for c in columns if f"{c.path_in_schema}.".startswith(f"{field}.")]
    size = sum(column.total_uncompressed_size for column in columns)
    packed = sum(column.total_compressed_size for column in columns)
    if size > MAX_BATCH_BYTES and size > MAX_RATIO * packed:
        what = f"unpacks from {packed:,} to {size:,} bytes"
        raise BadInput(what, "", "this is no text: leave the file out")
    return int(max(1, min(ROWS_PER_BATCH, MAX_BATCH_BYTES // max(1, size))))
