"""Documents out of files that hold many: JSON lines, Parquet rows, texts with a mark between."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.json_reader import (
    is_json_array,
    read_json_array,
    read_json_lines,
)
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import read_csv, read_parquet
from gptforge.data.prepare.text_io import (
    MAX_LINE_BYTES,
    REPLACED_NOTICE,
    TextFormat,
    read_chunks,
)


@dataclass(frozen=True)
class Document:
    """One document out of several in a file."""

    text: str
    index: int
    """Which one it is in its file, or in the part of it that was asked for."""
    bytes_read: int
    """Bytes of the file that were read so far."""


def has_many_documents(source: Source, text_format: TextFormat) -> bool:
    """Whether a file holds documents in a row, and is not one itself."""
    return source.kind != "text" or bool(text_format.split_on)


def read_documents(
    source: Source,
    text_format: TextFormat,
    bad_input: BadInputHandler,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Document]:
    """The documents of a file, or of a part of it: bytes of JSON lines, row groups of Parquet.

    Empty ones are passed over; what is bad is for `skipped` to judge.
    """
    number = 0
    readers = {
        "jsonl": read_json_lines,
        "parquet": read_parquet,
        "text": _read_delimited,
        "csv": _read_csv,
    }
    found = readers[source.kind]
    if source.kind == "jsonl" and start == 0 and is_json_array(source, text_format.encoding):
        found = read_json_array
    for text, reached in found(source, text_format, bad_input, start, stop):
        if "\0" in text:
            where = f"{source.name}, document {number + 1}"
            bad_input.handle(BadInput("NUL character", where, "remove it from the text"))
            continue
        if text.strip():
            yield Document(clean_text(text), number, reached)
        number += 1


def clean_text(text: str) -> str:
    """CRLF as LF, and no half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_delimited(
    source: Source, form: TextFormat, skipped: BadInputHandler, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    kept, reached = "", 0
    try:
        for chunk in read_chunks(source, encoding=form.encoding, start=start, stop=stop):
            # No mark ends in what was kept: it was looked for there.
            since = max(0, len(kept) - len(form.split_on) + 1)
            kept += chunk.text
            if chunk.has_replacements:
                skipped.notices.add(f"{source.name}: {REPLACED_NOTICE}")
            whole = []
            if kept.find(form.split_on, since) >= 0:
                *whole, kept = kept.split(form.split_on)
            reached = chunk.bytes_read
            for text in whole:
                yield text.strip("\n"), reached
            if len(kept) > MAX_LINE_BYTES:
                what = f"no {form.split_on!r} in {MAX_LINE_BYTES:,} characters"
                raise BadInput(
                    what,
                    source.name,
                    "give the mark that stands there with --split_on, or leave it out",
                )
    except BadInput as bad:
        skipped.handle(bad)
    else:
        yield kept.strip("\n"), reached


def _read_csv(
    source: Source, form: TextFormat, skipped: BadInputHandler, start: int, stop: int | None
) -> Iterator[tuple[str, int]]:
    return read_csv(source, form.field, form.encoding, skipped)
