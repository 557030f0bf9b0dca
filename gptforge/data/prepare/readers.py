"""Documents of a file: JSON records, table rows, or text between separators."""

from collections.abc import Iterator
from dataclasses import dataclass

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.json_reader import is_json_array, read_json_array, read_json_lines
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.table_reader import read_csv, read_parquet
from gptforge.data.prepare.text_io import MAX_LINE_LENGTH, InputPart, TextFormat


@dataclass(frozen=True)
class Document:
    """One of several documents in a file."""

    text: str
    index: int  # in the file, or in the part of it that is read
    bytes_read: int  # of the file, so far


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

    `start` and `stop` are bytes of a text or of JSON lines, and row groups of Parquet.
    """
    part = InputPart(source, text_format, bad_input, start, stop)
    if source.kind == "csv":
        texts = read_csv(part)
    elif source.kind == "text":
        texts = _read_delimited(part)
    elif source.kind == "parquet":
        texts = read_parquet(part)
    elif start == 0 and is_json_array(source, text_format.encoding):
        texts = read_json_array(part)
    else:
        texts = read_json_lines(part)
    index = 0
    try:
        for text, bytes_read in texts:
            if "\0" in text:
                location = f"{source.name}, document {index + 1}"
                bad_input.handle(BadInput("NUL character", location, "remove it from the text"))
                continue
            if text.strip():
                yield Document(clean_text(text), index, bytes_read)
            index += 1
    except BadInput as bad:
        # The rest of the file cannot be read.
        bad_input.handle(bad)


def clean_text(text: str) -> str:
    """Turn CRLF into LF, and lone surrogates, which UTF-8 cannot encode, into U+FFFD."""
    text = text.replace("\r\n", "\n") if "\r" in text else text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_delimited(part: InputPart) -> Iterator[tuple[str, int]]:
    separator, rest, bytes_read = part.text_format.split_on, "", 0
    for chunk in part.read_chunks():
        # `rest` was searched before, so a new separator ends in the new chunk.
        search_from = max(0, len(rest) - len(separator) + 1)
        rest += chunk.text
        bytes_read = chunk.bytes_read
        if rest.find(separator, search_from) >= 0:
            *texts, rest = rest.split(separator)
            yield from ((text.strip("\n"), bytes_read) for text in texts)
        if len(rest) > MAX_LINE_LENGTH:
            problem = f"no {separator!r} in {MAX_LINE_LENGTH:,} characters"
            hint = "give the separator of this file with --split_on, or leave it out"
            raise BadInput(problem, part.source.name, hint)
    yield rest.strip("\n"), bytes_read
