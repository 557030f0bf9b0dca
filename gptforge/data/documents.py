"""Documents out of files that hold many: JSON lines, Parquet rows, texts with a mark between."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gptforge.data.bad import BadInput, RefusedError, Skipped
from gptforge.data.fields import HOW_JOINED, field_in, is_text, text_of, value_of, which_fields
from gptforge.data.json_array import elements, is_array
from gptforge.data.reading import REPLACED, blocks, chunks, codec_of, not_in
from gptforge.data.sources import Source
from gptforge.data.tables import csv_texts
from gptforge.errors import UserError, reason

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
        name, errors = codec_of(self.encoding)
        if errors not in ("strict", "replace"):
            raise UserError(f"--encoding {self.encoding}: only :replace may stand behind a name")
        try:
            "".encode(name)
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
    readers = {"jsonl": _json_lines, "parquet": _rows, "text": _marked, "csv": _csv}
    found = readers[source.kind]
    if source.kind == "jsonl" and start == 0 and is_array(source, form.encoding):
        found = _json_array
    for text, reached in found(source, form, skipped, start, stop):
        if "\0" in text:
            where = f"{source.name}, document {number + 1}"
            skipped.add(BadInput("NUL character", where, "remove it from the text"))
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
            if chunk.is_replaced:
                skipped.notices.add(f"{source.name}: {REPLACED}")
            whole = []
            if kept.find(form.split_on, since) >= 0:
                *whole, kept = kept.split(form.split_on)
            reached = chunk.reached
            for text in whole:
                yield text.strip("\n"), reached
            if len(kept) > MOST_LINE:
                what = f"no {form.split_on!r} in {MOST_LINE:,} characters"
                raise BadInput(
                    what,
                    source.name,
                    "give the mark that stands there with --split_on, or leave it out",
                )
    except BadInput as bad:
        skipped.add(bad)
    else:
        yield kept.strip("\n"), reached


def _csv(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    return csv_texts(source, form.field, form.encoding, skipped)


def _json_array(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    number = 0
    try:
        for record, reached in elements(source, form.encoding, skipped.notices):
            number += 1
            try:
                yield _text_of(record, form, source, skipped), reached
            except BadInput as bad:
                where = f"{source.name}, element {number}"
                skipped.add(BadInput(bad.kind, where, bad.remedy))
    except BadInput as bad:
        skipped.add(bad)


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
                yield (
                    _text_of(_record_of(line, form, source, skipped), form, source, skipped),
                    reached,
                )
            except BadInput as bad:
                where = f"{source.name}, line {_line_number(source, begin)}"
                skipped.add(BadInput(bad.kind, where, bad.remedy))
    except BadInput as bad:
        skipped.add(bad)


def _parts_lines(encoding: str) -> bool:
    """Whether the byte of a line feed is one in this encoding, and stands alone."""
    try:
        return b"\n".decode(codec_of(encoding)[0]) == "\n"
    except UnicodeError:
        return False


def _record_of(line: bytes, form: Form, source: Source, skipped: Skipped) -> Any:
    if len(line) > MOST_LINE:
        raise BadInput(f"longer than {MOST_LINE // 2**20} MB", "", "divide it into documents")
    try:
        text = line.decode(*codec_of(form.encoding)).removeprefix("\ufeff")
        if "\ufffd" in text and form.encoding.endswith(":replace"):
            skipped.notices.add(f"{source.name}: {REPLACED}")
        return json.loads(text)
    except UnicodeError as error:
        what, remedy = not_in(form.encoding, error, line, source=source)
        raise BadInput(what, "", "save it as UTF-8" if b"\0" in line else remedy) from None
    except Exception as error:
        raise BadInput("not JSON", "", _how_to_mend(source, error)) from None


def _how_to_mend(source: Source, error: Exception) -> str:
    # A NUL of a file in UTF-16 is told of elsewhere.
    first = next((block for block, _ in blocks(source)), b"").lstrip()
    if source.path.suffix == ".json" and first.startswith(b"{") and b"\n" in first:
        return (
            "one object a line is read, or one array of objects; of a single object over many "
            f"lines, save the list of its texts ({reason(error)})"
        )
    return f"mend it, one object a line ({reason(error)})"


def _text_of(record: Any, form: Form, source: Source, skipped: Skipped) -> str:
    text, is_chat = text_of(record, form.field)
    if is_chat:
        skipped.notices.add(f"{source.name}: {HOW_JOINED}")
    return text


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
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source.name}: Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(source.path)
    except Exception as error:
        what = f"damaged Parquet file ({reason(error)})"
        raise BadInput(what, source.name, "fetch it again") from None
    schema = file.schema_arrow
    texts = [column.name for column in schema if _holds_text(column.type)]
    found = field_in(schema.names, form.field)
    if not found:
        what = f"no column '{form.field}'"
        raise BadInput(what, source.name, which_fields(schema.names, texts))
    if found not in texts:
        what = f"column '{found}' is no text but of type {schema.field(found).type}"
        raise BadInput(what, source.name, which_fields(schema.names, texts))
    return file


def _holds_text(kind: Any) -> bool:
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


def _rows(
    source: Source, form: Form, skipped: Skipped, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    try:
        file = open_parquet(source, form)
    except BadInput as bad:
        skipped.add(bad)
        return
    column = field_in(file.schema_arrow.names, form.field)
    with file:
        groups = file.metadata.num_row_groups
        for group in range(start, groups if stop is None else stop):
            reached = source.size * (group + 1 - start) // max(1, groups)
            where = f"{source.name}, row group {group + 1} of {groups}"
            try:
                rows = _rows_at_once(file.metadata, group, column)
                # A row group may be gigabytes: it is taken by its pages.
                for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                    for text in batch.column(0).to_pylist():
                        if text is None:
                            skipped.add(BadInput(f"'{column}' is null", where, "fill it in"))
                        elif is_text(text):
                            text, is_chat = value_of(text, column, "")
                            if is_chat:
                                skipped.notices.add(f"{source.name}: {HOW_JOINED}")
                            yield text, reached
                        else:
                            what = f"'{column}' is a chat with more than text"
                            skipped.add(BadInput(what, where))
            except BadInput as bad:
                skipped.add(BadInput(bad.kind, where, bad.remedy))
            except RefusedError:
                raise
            except Exception as error:
                what = "damaged row group"
                remedy = f"fetch it again ({reason(error)})"
                skipped.add(BadInput(what, where, remedy))


def _rows_at_once(metadata: Any, group: int, field: str) -> int:
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
    if size > ROWS_BYTES and size > MAX_RATIO * packed:
        what = f"unpacks from {packed:,} to {size:,} bytes"
        raise BadInput(what, "", "this is no text: leave the file out")
    return int(max(1, min(ROWS, ROWS_BYTES // max(1, size))))
