"""Documents out of files that hold many: JSON lines, Parquet rows, texts with a mark between."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gptforge.data.bad import BadInput, Skipped
from gptforge.data.reading import blocks, chunks, not_in
from gptforge.data.sources import Source
from gptforge.errors import UserError

MOST_LINE = 64 * 2**20
"""Bytes of a line, characters of a document: one must fit into memory several times."""
ROWS = 16
"""Parquet rows that are read at a time. Each may be a copy of one long text that is stored once."""
ROWS_BYTES = 2**28
"""What so many rows may take if each is as long as all of its row group."""
MAX_RATIO = 1000
"""Times its packed size that a large row group may unpack to; text unpacks to ten times at most."""


@dataclass(frozen=True)
class Form:
    """How text is found in the files."""

    field: str = "text"
    """Of a JSON line, or column of a Parquet file, that holds the text."""
    encoding: str = "utf-8"
    split_on: str = ""
    """What stands between the documents of a text file; empty: each file is one."""

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except (LookupError, UnicodeError):
            raise UserError(f"--encoding {self.encoding}: there is no such encoding") from None


@dataclass(frozen=True)
class Document:
    """One document out of several in a file."""

    text: str
    number: int
    """Which one it is in its file, or in the part of it that was asked for."""
    reached: int
    """Bytes of the file that were read so far."""


def holds_many(source: Source, form: Form) -> bool:
    """Whether a file holds documents in a row, and is not one itself."""
    return source.kind != "text" or bool(form.split_on)


def documents(
    source: Source, form: Form, skipped: Skipped, *, start: int = 0, stop: int | None = None
) -> Iterator[Document]:
    """The documents of a file, or of a part of it: bytes of JSON lines, row groups of Parquet.

    Empty ones are passed over; what is bad is for `skipped` to judge.
    """
    number = 0
    found = {"jsonl": _json_lines, "parquet": _rows, "text": _marked}[source.kind]
    for text, reached in found(source, form, skipped, start, stop):
        if "\0" in text:
            skipped.add(BadInput("NUL character", f"{source.name}, document {number + 1}"))
            continue
        if text.strip():
            yield Document(clean(text), number, reached)
        number += 1


def clean(text: str) -> str:
    """CRLF as LF, and no half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _marked(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    kept, reached = "", 0
    try:
        for chunk in chunks(source, encoding=form.encoding, start=start, stop=stop):
            # No mark ends in what was kept: it was looked for there.
            since = max(0, len(kept) - len(form.split_on) + 1)
            kept += chunk.text
            whole = []
            if kept.find(form.split_on, since) >= 0:
                *whole, kept = kept.split(form.split_on)
            reached = chunk.reached
            for text in whole:
                yield text.strip("\n"), reached
            if len(kept) > MOST_LINE:
                what = f"no {form.split_on!r} in {MOST_LINE:,} characters"
                raise BadInput(what, source.name, "leave --split_on out")
    except BadInput as bad:
        skipped.add(bad)
    else:
        yield kept.strip("\n"), reached


def _json_lines(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    at = start
    if not _parts_lines(form.encoding):
        what = f"JSON lines cannot be told apart in {form.encoding}"
        skipped.add(BadInput(what, source.name, "save it as UTF-8"))
        return
    try:
        for line, reached in _lines(source, start, stop):
            begin, at = at, at + len(line)
            if line.isspace():
                continue
            try:
                yield _field_of(line, form), reached
            except BadInput as bad:
                where = f"{source.name}, line {_line_number(source, begin)}"
                skipped.add(BadInput(bad.kind, where, bad.remedy))
    except BadInput as bad:
        skipped.add(bad)


def _parts_lines(encoding: str) -> bool:
    """Whether the byte of a line feed is one in this encoding, and stands alone."""
    try:
        return b"\n".decode(encoding) == "\n"
    except UnicodeError:
        return False


def _field_of(line: bytes, form: Form) -> str:
    if len(line) > MOST_LINE:
        raise BadInput(f"longer than {MOST_LINE // 2**20} MB", "")
    try:
        record: Any = json.loads(line.decode(form.encoding).removeprefix("\ufeff"))
    except UnicodeError as error:
        what, remedy = not_in(form.encoding, error, line)
        raise BadInput(what, "", "save it as UTF-8" if b"\0" in line else remedy) from None
    except (ValueError, RecursionError) as error:
        raise BadInput("not JSON", "", f"mend it, one object a line ({error})") from None
    if not isinstance(record, dict) or form.field not in record:
        has = ", ".join(list(record)[:8]) if isinstance(record, dict) else "no fields"
        raise BadInput(f"no field '{form.field}'", "", f"it has {has}: choose one with --field")
    if not isinstance(record[form.field], str):
        kind = type(record[form.field]).__name__
        raise BadInput(f"field '{form.field}' is no text", "", f"it is of type {kind}")
    return str(record[form.field])


def _lines(source: Source, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    """Lines with their line feeds. Of one that is too long, a part that is too long as well."""
    kept: list[bytes] = []
    length = reached = 0
    for block, reached in blocks(source, start, stop):
        first, feed, rest = block.partition(b"\n")
        if length <= MOST_LINE:
            kept.append(first + feed)
        length += len(first) + len(feed)
        if not feed:
            continue
        yield b"".join(kept), reached
        *whole, last = rest.split(b"\n")
        for line in whole:
            yield line + b"\n", reached
        kept, length = [last], len(last)
    if length:
        yield b"".join(kept), reached


def _line_number(source: Source, offset: int) -> int:
    """Lines are counted only when one is to be named."""
    return 1 + sum(block.count(b"\n") for block, _ in blocks(source, 0, offset))


def open_parquet(source: Source, form: Form) -> Any:
    """A Parquet file whose column of texts is there.

    Raises:
        BadInput: for a file that is none, or a column that is not there or not of text.
        UserError: if the package that reads it is missing.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source.name}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(source.path)
    except (pa.ArrowException, OSError) as error:
        what = f"damaged Parquet file ({_first_line(error)})"
        raise BadInput(what, source.name, "fetch it again") from None
    if form.field not in file.schema_arrow.names:
        has = ", ".join(file.schema_arrow.names[:8])
        what = f"no column '{form.field}'"
        raise BadInput(what, source.name, f"it has {has}: choose one with --field")
    kind = file.schema_arrow.field(form.field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"column '{form.field}' is no text", source.name, f"it is of type {kind}")
    return file


def _rows(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    try:
        file = open_parquet(source, form)
    except BadInput as bad:
        skipped.add(bad)
        return
    import pyarrow as pa

    with file:
        groups = file.metadata.num_row_groups
        for group in range(start, groups if stop is None else stop):
            reached = source.size * (group + 1 - start) // max(1, groups)
            where = f"{source.name}, row group {group + 1} of {groups}"
            try:
                rows = _rows_at_once(file.metadata, group, form.field)
                # A row group may be gigabytes: it is taken by its pages.
                for batch in file.iter_batches(rows, row_groups=[group], columns=[form.field]):
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            skipped.add(BadInput(f"'{form.field}' is null", where))
                        else:
                            yield text, reached
            except BadInput as bad:
                skipped.add(BadInput(bad.kind, where, bad.remedy))
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                what = "damaged row group"
                remedy = f"fetch it again ({_first_line(error)})"
                skipped.add(BadInput(what, where, remedy))


def _rows_at_once(metadata: Any, group: int, field: str) -> int:
    """How many rows fit into memory, whatever they are.

    A dictionary stores a text once for any number of rows: the size of the row group says how long
    its longest text may be, not how long all are together.

    Raises:
        BadInput: for a row group that unpacks to far more than any text does.
    """
    row_group = metadata.row_group(group)
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    column = next(column for column in columns if column.path_in_schema == field)
    size, packed = column.total_uncompressed_size, column.total_compressed_size
    if size > ROWS_BYTES and size > MAX_RATIO * packed:
        what = f"unpacks from {packed:,} to {size:,} bytes"
        raise BadInput(what, "", "this is no text: leave the file out")
    return int(max(1, min(ROWS, ROWS_BYTES // max(1, size))))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
