"""Documents of a file: JSON records, table rows, or text between separators."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.json_reader import is_json_array, read_json_array, read_json_lines
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import read_csv, read_parquet
from gptforge.data.prepare.text_io import MAX_LINE_LENGTH, TextFormat, read_chunks


@dataclass(frozen=True)
class Document:
    """One of several documents in a file.

    Attributes:
        index: of the document in the file, or in the part of it that is read.
        bytes_read: bytes of the file that were read so far.
    """

    text: str
    index: int
    bytes_read: int


def has_many_documents(source: Source, text_format: TextFormat) -> bool:
    """Whether a file contains several documents, and is not a single one."""
    return source.kind != "text" or bool(text_format.split_on)


def read_documents(
    source: Source,
    text_format: TextFormat,
    bad_input: BadInputHandler,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Document]:
    """The documents of a file, without empty ones.

    Args:
        source: the file.
        text_format: how to find the text in it.
        bad_input: what to do about unusable documents.
        start: first byte of a text or of JSON lines, or row group of Parquet, to read.
        stop: one past the last; None: the end.
    """
    if source.kind == "csv":
        texts = read_csv(source, text_format, bad_input)
    elif source.kind == "text":
        texts = _read_delimited(source, text_format, bad_input, start, stop)
    elif source.kind == "parquet":
        texts = read_parquet(source, text_format, bad_input, start, stop)
    elif start == 0 and is_json_array(source, text_format.encoding):
        texts = read_json_array(source, text_format, bad_input)
    else:
        texts = read_json_lines(source, text_format, bad_input, start, stop)
    index = 0
    for text, bytes_read in texts:
        if "\0" in text:
            location = f"{source.name}, document {index + 1}"
            bad_input.handle(BadInput("NUL character", location, "remove it from the text"))
            continue
        if text.strip():
            yield Document(clean_text(text), index, bytes_read)
        index += 1


def clean_text(text: str) -> str:
    """Turn CRLF into LF, and lone surrogates, which UTF-8 cannot encode, into U+FFFD."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_delimited(
    source: Source,
    text_format: TextFormat,
    bad_input: BadInputHandler,
    start: int,
    stop: int | None,
) -> Iterator[tuple[str, int]]:
    separator, rest, bytes_read = text_format.split_on, "", 0
    chunks = read_chunks(
        source, encoding=text_format.encoding, start=start, stop=stop, notices=bad_input.notices
    )
    try:
        for chunk in chunks:
            # `rest` was searched before, so a new separator ends in the new chunk.
            search_from = max(0, len(rest) - len(separator) + 1)
            rest += chunk.text
            texts = []
            if rest.find(separator, search_from) >= 0:
                *texts, rest = rest.split(separator)
            bytes_read = chunk.bytes_read
            for text in texts:
                yield text.strip("\n"), bytes_read
            if len(rest) > MAX_LINE_LENGTH:
                raise BadInput(
                    f"no {separator!r} in {MAX_LINE_LENGTH:,} characters",
                    source.name,
                    "give the separator of this file with --split_on, or leave it out",
                )
    except BadInput as bad:
        bad_input.handle(bad)
    else:
        yield rest.strip("\n"), bytes_read
