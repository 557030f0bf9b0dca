"""A first look at the data: how many documents there are, and what a long text is like inside."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np

from gptforge.data.bad import BadInput, Skipped
from gptforge.data.documents import Document, Form, documents, holds_many
from gptforge.data.finding import counted
from gptforge.data.reading import chunks, mended
from gptforge.data.sources import Source
from gptforge.data.split import MANY, Seen, Split, digest_from, digest_of, make_split
from gptforge.errors import UserError

CLEFT = re.compile(rb"(?<!\r)[ \n](?=[^\s])")
"""Before the last blank of several, GPT-2's pattern parts a text anyway."""
WINDOW = 2**16
FARTHEST = 2**26
"""Bytes behind which the search for such a place is given up."""
STEP = 2**20
"""Bytes between places that are remembered: every block of a long text would be too many."""


@dataclass
class TextFacts:
    """What one look through a text file tells."""

    characters: int = 0
    sha256: bytes = b""
    """Of the text as it is learned, in UTF-8."""
    mended: set[str] = field(default_factory=set)
    is_blank: bool = True
    steps: list[tuple[int, int]] = field(default_factory=list)
    """Bytes of the file where a chunk begins, and characters before it."""

    @property
    def digest(self) -> int:
        """As documents are known by."""
        return digest_from(self.sha256)


def measure(source: Source, encoding: str) -> TextFacts:
    """Look through a text file, in constant memory.

    Raises:
        BadInput: where it is not text.
    """
    facts, running = TextFacts(), hashlib.sha256()
    for chunk in chunks(source, encoding=encoding):
        if not facts.steps or chunk.offset - facts.steps[-1][0] >= STEP:
            facts.steps.append((chunk.offset, facts.characters))
        facts.characters += len(chunk.text)
        facts.mended |= mended(chunk)
        facts.is_blank = facts.is_blank and not chunk.text.strip()
        running.update(chunk.text.encode("utf-8"))
    facts.sha256 = running.digest()
    return facts


@dataclass
class Survey:
    """What was seen before the work begins."""

    split: Split
    sha256: str
    """Of the text, where there is only one; empty otherwise."""
    facts: dict[int, TextFacts]
    """Of text files that were looked through, by the number of the source."""
    notices: tuple[str, ...] = ()
    """What should be known about the split, in words."""


def survey(
    sources: Sequence[Source],
    form: Form,
    fraction: float,
    *,
    skip_bad: bool,
    held_out: tuple[int, ...] = (),
    part_copies: bool = False,
) -> Survey:
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
    facts: dict[int, TextFacts] = {}
    seen: list[Seen] = []
    sha256 = ""
    # Counted anew when the work is done; here it is passed over.
    skipped = Skipped(skip_bad)
    for number, source in enumerate(sources):
        if holds_many(source, form):
            for document in documents(source, form, skipped):
                seen.append(_seen(number, document))
                sha256 = hashlib.sha256(document.text.encode("utf-8")).hexdigest()
                if len(seen) == MANY:
                    break
        else:
            try:
                found = facts[number] = measure(source, form.encoding)
            except BadInput as bad:
                skipped.add(bad)
                continue
            if not found.is_blank:
                seen.append(Seen((number, 0), found.characters, found.digest))
                sha256 = found.sha256.hex()
        if len(seen) == MANY:
            break
    if not seen:
        raise UserError(no_text([source.name for source in sources], skipped))
    if held_out:
        _check_sides(sources, form, skip_bad, held_out)
        return Survey(Split("files", fraction, held_out=held_out), "", facts)
    split = make_split(seen, fraction, part_copies=part_copies)
    return Survey(split, sha256 if len(seen) == 1 else "", facts, _on_copies(seen, split))


def _on_copies(seen: Sequence[Seen], split: Split) -> tuple[str, ...]:
    """What becomes of copies of one of a few documents."""
    if split.rule != "boundary":
        return ()
    if twice := len(split.exceptions):
        of = counted(twice, "document stands", "documents stand")
        return (f"{of} in the text more than once: all copies are on one side",)
    sides: dict[int, set[str]] = {}
    for document in seen:
        side = split.side(document.place, document.digest)
        sides.setdefault(document.digest, set()).add(side)
    if twice := sum(len(both) > 1 for both in sides.values()):
        of = counted(twice, "document is", "documents are")
        return (f"{of} both learned and held out, for copies: the held-out loss says too little",)
    return ()


def _check_sides(
    sources: Sequence[Source], form: Form, skip_bad: bool, held_out: tuple[int, ...]
) -> None:
    """Raise a UserError if the files of either side hold no text."""
    judged = [sources[number] for number in held_out]
    learned = [source for number, source in enumerate(sources) if number not in set(held_out)]
    for side, what in ((learned, "to learn from"), (judged, "held out by their names")):
        skipped = Skipped(skip_bad)
        if not any(text.strip() for source in side for text in _readable(source, form, skipped)):
            raise UserError(
                f"{no_text([source.name for source in side], skipped)}; these are the files "
                f"{what}: --split_by_name false takes them like all others"
            )


def _readable(source: Source, form: Form, skipped: Skipped) -> Iterator[str]:
    try:
        yield from texts(source, form, skipped)
    except BadInput as bad:
        skipped.add(bad)


def no_text(names: Sequence[str], skipped: Skipped) -> str:
    """Why there is no text in files, in words."""
    more = f" and {len(names[3:]):,} more" if len(names) > 3 else ""
    where = ", ".join(names[:3]) + more
    if not skipped.counts:
        return f"{where}: empty: there is no text to learn"
    kinds = ", ".join(f"{count:,} x {kind}" for kind, count in skipped.counts.items())
    return (
        f"{where}: all that is in there was left out ({kinds}), and there is no text to learn; "
        f"first {skipped.examples[0]}: {skipped.remedies[0]}"
    )


def _seen(number: int, document: Document) -> Seen:
    return Seen((number, document.number), len(document.text), digest_of(document.text))


def alphabet(sources: Sequence[Source], form: Form, *, skip_bad: bool) -> str:
    """Every character of the data, in code point order."""
    known = np.zeros(0x110000, bool)
    for source in sources:
        skipped = Skipped(skip_bad)
        try:
            for text in texts(source, form, skipped):
                known[np.frombuffer(text.encode("utf-32-le"), np.uint32)] = True
        except BadInput as bad:
            skipped.add(bad)
    return "".join(map(chr, np.flatnonzero(known).tolist()))


def texts(source: Source, form: Form, skipped: Skipped) -> Iterator[str]:
    """All text of a file, in pieces; documents whole."""
    if holds_many(source, form):
        yield from (document.text for document in documents(source, form, skipped))
    else:
        yield from (chunk.text for chunk in chunks(source, encoding=form.encoding))


def byte_of(source: Source, facts: TextFacts, character: int) -> int:
    """Byte of a UTF-8 file where a character of its text begins."""
    before = [characters for _, characters in facts.steps]
    start, passed = facts.steps[bisect_right(before, character) - 1]
    for chunk in chunks(source, start=start):
        if character <= passed + len(chunk.text):
            break
        passed += len(chunk.text)
    wanted = character - passed
    # The mark and each CR were taken out of the text, and are bytes of the file all the same.
    skip = len(chunk.raw) - len(chunk.text) - chunk.raw.count("\r\n")
    place, position = skip, chunk.raw.find("\r\n")
    returns = 0
    while position >= 0 and position - skip - returns < wanted:
        returns += 1
        position = chunk.raw.find("\r\n", position + 2)
    return chunk.offset + len(chunk.raw[: place + wanted + returns].encode("utf-8"))


def clefts(source: Source, start: int, stop: int, every: int) -> list[int]:
    """Bytes where a UTF-8 text may be cut so that no token changes, about `every` bytes apart."""
    found: list[int] = []
    with source.path.open("rb") as file:
        wanted = start + every
        while wanted < stop and (place := _cleft(file, wanted, stop)) is not None:
            found.append(place)
            wanted = place + every
    return found


def _cleft(file: IO[bytes], wanted: int, stop: int) -> int | None:
    for begin in range(wanted, min(stop, wanted + FARTHEST), WINDOW):
        file.seek(begin - 1)
        # What stands before it, and all bytes of the character behind it.
        part = file.read(min(WINDOW + 8, stop - begin + 1))
        for match in CLEFT.finditer(part, 1, WINDOW):
            following = part[match.end() : match.end() + 4].decode("utf-8", errors="ignore")
            if following and not following[0].isspace():
                return begin - 1 + match.start()
    return None
