"""Texts in a column of a CSV, TSV or Parquet file."""

import csv
from collections.abc import Iterator
from itertools import chain, islice, zip_longest
from typing import Any

from gptforge.data.input_errors import BadInput, BadInputError
from gptforge.data.prepare.json_reader import (
    available_fields_hint,
    find_field,
    is_text,
    text_from_value,
)
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.text_io import MAX_LINE_LENGTH, InputPart, TextFormat, split_lines
from gptforge.errors import UserError, error_reason, explain_os_error

DELIMITERS = ",;\t|"
PEEK_ROWS = 20  # rows to search for columns that contain text
KIND_TEXT_HINT = "or read the file as plain text with --kind text"
ROWS_PER_BATCH = 16  # few, since a Parquet dictionary may store a long text once for many rows
MAX_BATCH_BYTES = 2**28  # size of a batch if every row were as long as its row group
MAX_RATIO = 1000  # decompressed to compressed size of a large row group; about 10 for text


def read_csv(part: InputPart) -> Iterator[str]:
    """The texts of a column.

    The first line names the columns. A .tsv is delimited by tabs, any other file by whichever of
    , ; tab and | is most frequent in its first line. Quoting follows RFC 4180.
    """
    csv.field_size_limit(MAX_LINE_LENGTH)  # an unclosed quote must not read the rest of the file
    source, field, lines = part.source, part.text_format.field, _read_lines(part)
    first = next(lines, "")
    is_tsv = ".tsv" in [suffix.lower() for suffix in source.path.suffixes[-2:]]
    delimiter = "\t" if is_tsv else max(DELIMITERS, key=first.count)
    rows = csv.reader(chain([first] if first else [], lines), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if not header:
            return
        if field not in header:
            columns = zip_longest(header, *islice(rows, PEEK_ROWS), fillvalue="")
            texts = [name for name, *cells in columns if name and any(map(_is_text, cells))]
            hint = f"{available_fields_hint(header, texts)}, {KIND_TEXT_HINT}"
            raise BadInput(f"no column '{field}'", source.name, hint)
        column = header.index(field)
        for row in rows:
            if len(row) == len(header):
                yield row[column]
            elif row:
                problem = f"{len(row)} fields, and the first line names {len(header)}"
                hint = f"put fields that contain a delimiter in quotes, {KIND_TEXT_HINT}"
                location = f"{source.name}, line {rows.line_num}"
                part.bad_input.handle(BadInput(problem, location, hint))
    except csv.Error as error:
        hint = f"correct the quotes, {KIND_TEXT_HINT}"
        location = f"{source.name}, line {rows.line_num}"
        raise BadInput(f"not CSV: {error}", location, hint) from None


def _read_lines(part: InputPart) -> Iterator[str]:
    texts = (chunk.text for chunk in part.read_chunks())
    for number, line in enumerate(split_lines(texts, "\n"), 1):
        if len(line) > MAX_LINE_LENGTH:
            problem = f"a line longer than {MAX_LINE_LENGTH // 2**20} MB"
            location = f"{part.source.name}, line {number}"
            raise BadInput(problem, location, KIND_TEXT_HINT.removeprefix("or "))
        yield line


def _is_text(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return True
    return False


def open_parquet(source: Source, text_format: TextFormat) -> Any:
    """Open a Parquet file, and check that it has the column of texts."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source.name}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(source.path)
    except PermissionError as error:
        problem, hint = explain_os_error(error)
        raise BadInput(problem, source.name, hint) from None
    except Exception as error:
        problem = f"damaged Parquet file ({error_reason(error)})"
        raise BadInput(problem, source.name, "download it again") from None
    schema = file.schema_arrow
    texts = [column.name for column in schema if _is_text_column(column.type)]
    found = find_field(schema.names, text_format.field)
    if found in texts:
        return file
    problem = f"no column '{text_format.field}'"
    if found:
        problem = f"column '{found}' is not text but of type {schema.field(found).type}"
    raise BadInput(problem, source.name, available_fields_hint(schema.names, texts))


def _is_text_column(kind: Any) -> bool:
    """Whether the values are strings or chats."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        is_struct = pa.types.is_struct(kind.value_type)
        names = {field.name for field in kind.value_type} if is_struct else set()
        return {"role", "content"} <= names or {"from", "value"} <= names
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_kind(kind) for is_kind in kinds)


def read_parquet(part: InputPart) -> Iterator[str]:
    """The texts of row groups."""
    source, start, bad_input = part.source, part.start, part.bad_input
    file = open_parquet(source, part.text_format)
    column = find_field(file.schema_arrow.names, part.text_format.field)
    with file:
        num_groups = file.metadata.num_row_groups
        for group in range(start, num_groups if part.stop is None else part.stop):
            part.bytes_read = source.size * (group + 1 - start) // max(1, num_groups)
            location = f"{source.name}, row group {group + 1} of {num_groups}"
            try:
                rows = rows_per_batch(file.metadata, group, column)
                # A row group may have gigabytes, so it is read in batches.
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                    for value in batch.column(0).to_pylist():
                        if is_text(value):
                            yield text_from_value(value, column, part)
                            continue
                        problem, hint = f"'{column}' is a chat with more than text", ""
                        if value is None:
                            problem, hint = f"'{column}' is null", "fill it in"
                        bad_input.handle(BadInput(problem, location, hint))
            except BadInput as bad:
                bad_input.handle(bad, location)
            except BadInputError:
                raise
            except Exception as error:
                hint = f"download it again ({error_reason(error)})"
                bad_input.handle(BadInput("damaged row group", location, hint))
    source.check_unchanged(source.path.stat())


def rows_per_batch(metadata: Any, group: int, column: str) -> int:
    """The number of rows of a row group that fit into memory, whatever their lengths.

    A dictionary stores a text once for any number of rows, so the size of a row group is a bound of
    the length of one text, not of their sum. A BadInput if it decompresses to more than text does.
    """
    row_group = metadata.row_group(group)
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    # A chat has several columns, such as messages.list.element.content.
    columns = [c for c in columns if f"{c.path_in_schema}.".startswith(f"{column}.")]
    size = sum(column.total_uncompressed_size for column in columns)
    compressed = sum(column.total_compressed_size for column in columns)
    if size > MAX_BATCH_BYTES and size > MAX_RATIO * compressed:
        problem = f"decompresses from {compressed:,} to {size:,} bytes"
        raise BadInput(problem, hint="this is not text: leave the file out")
    return int(max(1, min(ROWS_PER_BATCH, MAX_BATCH_BYTES // max(1, size))))
