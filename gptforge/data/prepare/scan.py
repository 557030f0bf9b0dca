"""A first look at the data: how many documents there are, and what a long text is like inside."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.readers import Document, has_many_documents, read_documents
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import (
    MIN_HASH_DOCUMENTS,
    DocumentStats,
    SplitRule,
    digest_from_sha256,
    make_split_rule,
    text_digest,
)
from gptforge.data.prepare.text_io import TextFormat, describe_fixes, read_chunks
from gptforge.errors import UserError
from gptforge.printable import pluralize

SAFE_CUT_BYTES = re.compile(rb"(?<!\r)[ \n](?=[^\s])")
"""Before the last blank of several, GPT-2's pattern parts a text anyway."""
SEARCH_BLOCK = 2**16
MAX_SEARCH_BYTES = 2**26
"""Bytes behind which the search for such a place is given up."""
OFFSET_STRIDE = 2**20
"""Bytes between places that are remembered: every block of a long text would be too many."""


@dataclass
class TextStats:
    """What one look through a text file tells."""

    num_chars: int = 0
    sha256: bytes = b""
    """Of the text as it is learned, in UTF-8."""
    fixes: set[str] = field(default_factory=set)
    is_blank: bool = True
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """Bytes of the file where a chunk begins, and characters before it."""

    @property
    def digest(self) -> int:
        """As documents are known by."""
        return digest_from_sha256(self.sha256)


def scan_text(source: Source, encoding: str) -> TextStats:
    """Look through a text file, in constant memory.

    Raises:
        BadInput: where it is not text.
    """
    facts, running = TextStats(), hashlib.sha256()
    for chunk in read_chunks(source, encoding=encoding):
        if not facts.offsets or chunk.offset - facts.offsets[-1][0] >= OFFSET_STRIDE:
            facts.offsets.append((chunk.offset, facts.num_chars))
        facts.num_chars += len(chunk.text)
        facts.fixes |= describe_fixes(chunk)
        facts.is_blank = facts.is_blank and not chunk.text.strip()
        running.update(chunk.text.encode("utf-8"))
    facts.sha256 = running.digest()
    return facts


@dataclass
class ScanResult:
    """What was seen before the work begins."""

    split_rule: SplitRule
    sha256: str
    """Of the text, where there is only one; empty otherwise."""
    text_stats: dict[int, TextStats]
    """Of text files that were looked through, by the number of the source."""
    notices: tuple[str, ...] = ()
    """What should be known about the split, in words."""


def scan(
    sources: Sequence[Source],
    text_format: TextFormat,
    val_fraction: float,
    *,
    skip_bad: bool,
    val_sources: tuple[int, ...] = (),
    split_duplicates: bool = False,
) -> ScanResult:
    """Look at the first documents, as many as the rule for holding out needs.

    Args:
        sources: the files.
        form: how text is found in them.
        fraction: share to hold out.
        skip_bad: whether to pass over what cannot be read.
        held_out: indices of the files that are held out by their names, if any are.
        part_copies: whether copies of one of a few documents may land on both sides.

    Raises:
        UserError: if there is no text, or what there is cannot be read.
    """
    facts: dict[int, TextStats] = {}
    seen: list[DocumentStats] = []
    sha256 = ""
    # Counted anew when the work is done; here it is passed over.
    skipped = BadInputHandler(skip_bad)
    for number, source in enumerate(sources):
        if has_many_documents(source, text_format):
            for document in read_documents(source, text_format, skipped):
                seen.append(_seen(number, document))
                sha256 = hashlib.sha256(document.text.encode("utf-8")).hexdigest()
                if len(seen) == MIN_HASH_DOCUMENTS:
                    break
        else:
            try:
                found = facts[number] = scan_text(source, text_format.encoding)
            except BadInput as bad:
                skipped.handle(bad)
                continue
            if not found.is_blank:
                seen.append(DocumentStats((number, 0), found.num_chars, found.digest))
                sha256 = found.sha256.hex()
        if len(seen) == MIN_HASH_DOCUMENTS:
            break
    if not seen:
        raise UserError(no_text_message([source.name for source in sources], skipped))
    if val_sources:
        _check_sides(sources, text_format, skip_bad, val_sources)
        return ScanResult(SplitRule("files", val_fraction, val_sources=val_sources), "", facts)
    split = make_split_rule(seen, val_fraction, split_duplicates=split_duplicates)
    return ScanResult(split, sha256 if len(seen) == 1 else "", facts, _on_copies(seen, split))


def _on_copies(seen: Sequence[DocumentStats], split: SplitRule) -> tuple[str, ...]:
    """What becomes of copies of one of a few documents."""
    if split.rule != "boundary":
        return ()
    if twice := len(split.exceptions):
        of = pluralize(twice, "document stands", "documents stand")
        return (f"{of} in the text more than once: all copies are on one side",)
    sides: dict[int, set[str]] = {}
    for document in seen:
        side = split.assign(document.id, document.digest)
        sides.setdefault(document.digest, set()).add(side)
    if twice := sum(len(both) > 1 for both in sides.values()):
        of = pluralize(twice, "document is", "documents are")
        return (f"{of} both learned and held out, for copies: the held-out loss says too little",)
    return ()


def _check_sides(
    sources: Sequence[Source], text_format: TextFormat, skip_bad: bool, held_out: tuple[int, ...]
) -> None:
    """Raise a UserError if the files of either side hold no text."""
    judged = [sources[number] for number in held_out]
    learned = [source for number, source in enumerate(sources) if number not in set(held_out)]
    for side, what in ((learned, "to learn from"), (judged, "held out by their names")):
        skipped = BadInputHandler(skip_bad)
        if not any(
            text.strip() for source in side for text in _readable(source, text_format, skipped)
        ):
            raise UserError(
                f"{no_text_message([source.name for source in side], skipped)}; these are the files "
                f"{what}: --split_by_name false takes them like all others"
            )


def _readable(source: Source, text_format: TextFormat, skipped: BadInputHandler) -> Iterator[str]:
    try:
        yield from iter_text(source, text_format, skipped)
    except BadInput as bad:
        skipped.handle(bad)


def no_text_message(names: Sequence[str], skipped: BadInputHandler) -> str:
    """Why there is no text in files, in words."""
    more = f" and {len(names[3:]):,} more" if len(names) > 3 else ""
    where = ", ".join(names[:3]) + more
    if not skipped.counts:
        return f"{where}: empty: there is no text to learn"
    kinds = ", ".join(f"{count:,} x {kind}" for kind, count in skipped.counts.items())
    return (
        f"{where}: all that is in there was left out ({kinds}), and there is no text to learn; "
        f"first {skipped.examples[0]}: {skipped.hints[0]}"
    )


def _seen(number: int, document: Document) -> DocumentStats:
    return DocumentStats((number, document.index), len(document.text), text_digest(document.text))


def collect_alphabet(sources: Sequence[Source], text_format: TextFormat, *, skip_bad: bool) -> str:
    """Every character of the data, in code point order."""
    known = np.zeros(0x110000, bool)
    for source in sources:
        skipped = BadInputHandler(skip_bad)
        try:
            for text in iter_text(source, text_format, skipped):
                known[np.frombuffer(text.encode("utf-32-le"), np.uint32)] = True
        except BadInput as bad:
            skipped.handle(bad)
    return "".join(map(chr, np.flatnonzero(known).tolist()))


def iter_text(source: Source, text_format: TextFormat, skipped: BadInputHandler) -> Iterator[str]:
    """All text of a file, in pieces; documents whole."""
    if has_many_documents(source, text_format):
        yield from (document.text for document in read_documents(source, text_format, skipped))
    else:
        yield from (chunk.text for chunk in read_chunks(source, encoding=text_format.encoding))


def byte_offset(source: Source, stats: TextStats, char_index: int) -> int:
    """Byte of a UTF-8 file where a character of its text begins."""
    before = [characters for _, characters in stats.offsets]
    start, passed = stats.offsets[bisect_right(before, char_index) - 1]
    for chunk in read_chunks(source, start=start):
        if char_index <= passed + len(chunk.text):
            break
        passed += len(chunk.text)
    wanted = char_index - passed
    # The mark and each CR were taken out of the text, and are bytes of the file all the same.
    skip = len(chunk.raw) - len(chunk.text) - chunk.raw.count("\r\n")
    place, position = skip, chunk.raw.find("\r\n")
    returns = 0
    while position >= 0 and position - skip - returns < wanted:
        returns += 1
        position = chunk.raw.find("\r\n", position + 2)
    return chunk.offset + len(chunk.raw[: place + wanted + returns].encode("utf-8"))


def find_safe_cuts(source: Source, start: int, stop: int, stride: int) -> list[int]:
    """Bytes where a UTF-8 text may be cut so that no token changes, about `every` bytes apart."""
    found: list[int] = []
    with source.path.open("rb") as file:
        wanted = start + stride
        while wanted < stop and (place := _cleft(file, wanted, stop)) is not None:
            found.append(place)
            wanted = place + stride
    return found


def _cleft(file: IO[bytes], wanted: int, stop: int) -> int | None:
    for begin in range(wanted, min(stop, wanted + MAX_SEARCH_BYTES), SEARCH_BLOCK):
        file.seek(begin - 1)
        # What stands before it, and all bytes of the character behind it.
        part = file.read(min(SEARCH_BLOCK + 8, stop - begin + 1))
        for match in SAFE_CUT_BYTES.finditer(part, 1, SEARCH_BLOCK):
            following = part[match.end() : match.end() + 4].decode("utf-8", errors="ignore")
            if following and not following[0].isspace():
                return begin - 1 + match.start()
    return None
