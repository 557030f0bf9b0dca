"""Documents of a file: a text, JSON records, table rows, or text between separators.

`read_split` gives their split as well, to encode them or to learn a tokenizer from them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.json_reader import read_json
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule, text_digest
from gptforge.data.prepare.table_reader import read_csv, read_parquet
from gptforge.data.prepare.text_io import (
    CR_NOTICE,
    CRLF_NOTICE,
    MAX_LINE_LENGTH,
    SURROGATE_NOTICE,
    InputPart,
    TextFormat,
    text_stats,
)
from gptforge.data.shard_index import SplitName
from gptforge.errors import UserError
from gptforge.tokenizers.base import SAFE_CUT

UP_TO_LAST_SAFE_CUT = re.compile(f".*{SAFE_CUT.pattern}", re.DOTALL)
MAX_UNBROKEN_CHARS = 2**26  # a longer run without whitespace is not text


def has_many_documents(source: Source, text_format: TextFormat) -> bool:
    """Whether a file contains several documents, and is not a single one."""
    return source.kind != "text" or bool(text_format.split_on)


def read_documents(part: InputPart) -> Iterator[tuple[int, str]]:
    """The index of each document in the part, and its text, without empty ones.

    A BadInput if the rest of the file cannot be read.
    """
    readers = {
        "csv": read_csv,
        "jsonl": read_json,
        "parquet": read_parquet,
        "text": _read_delimited,
    }
    texts = readers[part.source.kind](part)
    for index, text in enumerate(texts):
        if "\0" in text:
            location = f"{part.source.name}, document {index + 1}"
            part.bad_input.handle(BadInput("NUL character", location, "remove it from the text"))
        elif text.strip():
            yield index, clean_text(text, part)


def clean_text(text: str, part: InputPart) -> str:
    """Turn CRLF into LF, and lone surrogates, which UTF-8 cannot encode, into U+FFFD; note it."""
    if "\r\n" in text:
        part.note(CRLF_NOTICE)
        text = text.replace("\r\n", "\n")
    if "\r" in text:
        part.note(CR_NOTICE)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        part.note(SURROGATE_NOTICE)
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_delimited(part: InputPart) -> Iterator[str]:
    separator, rest = part.text_format.split_on, ""
    for chunk in part.read_chunks():
        part.note_fixes(chunk)
        # `rest` was searched before, so a new separator ends in the new chunk.
        search_from = max(0, len(rest) - len(separator) + 1)
        rest += chunk.text
        if rest.find(separator, search_from) >= 0:
            *texts, rest = rest.split(separator)
            yield from (text.strip("\n") for text in texts)
        if len(rest) > MAX_LINE_LENGTH:
            problem = f"no {separator!r} in {MAX_LINE_LENGTH:,} characters"
            hint = "give the separator of this file with --split_on, or leave it out"
            raise BadInput(problem, part.source.name, hint)
    yield rest.strip("\n")


@dataclass(frozen=True)
class FileSpan:
    """A file or a part of one."""

    source_index: int
    source: Source
    start: int = 0  # byte of a text or of JSON lines, row group of a Parquet file
    stop: int | None = None  # in the same unit
    split: SplitName | None = None  # set for the parts of a long text
    starts_document: bool = True
    num_bytes: int = 0  # bytes on disk, for the progress bar


@dataclass(frozen=True)
class SplitText:
    """A document, or a part of a long one that ends where its ids are those of the parts."""

    text: str
    split: SplitName
    document: int  # its index in the file, or in the span
    starts_document: bool
    bytes_read: int  # of the span, so far


def read_split(
    span: FileSpan, rule: SplitRule, text_format: TextFormat, bad_input: BadInputHandler
) -> Iterator[SplitText]:
    """Yield the documents of a span in order; a file that is one text in parts."""
    part = InputPart(span.source, text_format, bad_input, span.start, span.stop)
    try:
        if has_many_documents(span.source, text_format):
            yield from _split_documents(part, span, rule)
        else:
            yield from _split_text(part, span, rule)
    except BadInput as bad:
        bad_input.handle(bad)


def _split_documents(part: InputPart, span: FileSpan, rule: SplitRule) -> Iterator[SplitText]:
    for index, text in read_documents(part):
        if rule.rule == "character":
            yield SplitText(text[: rule.cut], "train", index, True, part.bytes_read)
            yield SplitText(text[rule.cut :], "val", index, True, part.bytes_read)
        else:
            # Hashing every document costs time, and other rules do not look at the digest.
            digest = text_digest(text) if rule.rule == "hash" or rule.exceptions else 0
            split = rule.assign((span.source_index, index), digest)
            yield SplitText(text, split, index, True, part.bytes_read)


def _split_text(part: InputPart, span: FileSpan, rule: SplitRule) -> Iterator[SplitText]:
    """A single text, which may not fit into memory, cut between words while it is read."""
    split, cut = span.split, None
    if split is None:
        stats = text_stats(part.read_chunks())
        if stats.is_blank:
            return
        split = rule.assign((span.source_index, 0), stats.digest)
        cut = rule.cut if rule.rule == "character" else None
    pending, num_chars, starts_document = "", 0, span.starts_document
    for chunk in part.read_chunks():
        part.note_fixes(chunk)
        text = chunk.text
        if cut is not None and cut - num_chars < len(text):
            train, text = text[: cut - num_chars], text[cut - num_chars :]
            yield SplitText(pending + train, split, 0, starts_document, part.bytes_read)
            pending, split, starts_document, cut = "", "val", True, None
        num_chars += len(chunk.text)
        # A space at the old end may become a safe cut by the character after it.
        search_start = max(1, len(pending) - 1)
        pending += text
        if (position := last_safe_cut(pending, search_start)) is not None:
            yield SplitText(pending[:position], split, 0, starts_document, part.bytes_read)
            pending, starts_document = pending[position:], False
        elif len(pending) > MAX_UNBROKEN_CHARS:
            problem = f"{MAX_UNBROKEN_CHARS:,} characters without a space"
            raise UserError(f"{part.source.name}: {problem}: this is not text; leave it out")
    if pending:
        yield SplitText(pending, split, 0, starts_document, part.bytes_read)


def last_safe_cut(text: str, start: int = 1) -> int | None:
    """Find the last index, at least `start`, where cutting a text changes none of its ids."""
    match = UP_TO_LAST_SAFE_CUT.match(text, start)
    return match.end() - 1 if match else None
