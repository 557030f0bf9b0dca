"""One job of a preparation: a stretch of the data into shards of its own.

Jobs know nothing of each other, so any number of processes gives the same bytes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import files
from gptforge.data.bad import BadInput, Skipped
from gptforge.data.documents import Form, documents, holds_many
from gptforge.data.reading import Chunk, chunks, mended
from gptforge.data.side import SideShards
from gptforge.data.sources import Source
from gptforge.data.split import Side, Split, digest_of
from gptforge.data.survey import measure
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.base import CLEFT, END_OF_TEXT, Tokenizer, smallest_dtype
from gptforge.tokenizers.bulk import BulkEncoder

AT_ONCE = 2**20
"""Characters that are encoded at a time."""
WHOLE = 2**23
"""Bytes of a text file that is read whole."""
UNBROKEN = 2**26
"""Characters without a blank that are still taken for text."""
CHECKED = 2**16
"""Characters at a job's beginning that both encoders are shown."""


@dataclass(frozen=True)
class Piece:
    """A file, or a part of one."""

    number: int
    """Of the source."""
    source: Source
    start: int = 0
    """Byte of a text or of JSON lines, row group of Parquet."""
    stop: int | None = None
    side: Side | None = None
    """Set where the piece is a part of one long text."""
    begins: bool = True
    """Whether a document begins with it."""
    weight: int = 0
    """Bytes of the file that it stands for."""


@dataclass(frozen=True)
class Job:
    """Pieces that make shards of their own."""

    number: int
    pieces: tuple[Piece, ...]


@dataclass
class Done:
    """What a job made: all that the index needs."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    encoder: str = ""
    sides: dict[str, list[Side]] = field(default_factory=dict)
    """By the number of a source, as text: the sides that text of it went to."""
    marks: int = 0
    """Literal end-of-text marks in the text."""

    def to_json(self) -> dict[str, Any]:
        """As it is kept until all jobs are done."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Done":
        """Read what `to_json` wrote; a ValueError or whatever comes first if it is not that."""
        done = cls(**record)
        texts = [done.encoder, *done.examples, *done.notices]
        counts = list(done.skipped.values())
        for shard in done.shards:
            texts += [shard["file"], shard["sha256"]]
            counts += [shard[name] for name in ("documents", "characters", "bytes", "tokens")]
            if Path(shard["file"]).name != shard["file"] or shard["split"] not in ("train", "val"):
                raise ValueError("not a shard of this folder")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text was expected")
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise TypeError("a count was expected")
        return done


class Worker:
    """Does jobs, one after the other.

    Args:
        folder: where the shards go.
        tokenizer: what encodes.
        split: which side a document belongs to.
        form: how text is found.
        skip_bad: whether to leave out what cannot be read.
        progress: told how many bytes of the files are done, and how many bytes of text; may raise
            to stop the work.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        split: Split,
        form: Form,
        *,
        skip_bad: bool,
        progress: Callable[[int, int], None] = lambda read, text: None,
    ) -> None:
        self._folder, self._split, self._form = folder, split, form
        self._skip_bad, self._progress = skip_bad, progress
        self._tokenizer = tokenizer
        self._encoder = BulkEncoder(tokenizer)
        self._dtype = smallest_dtype(tokenizer.size)

    def run(self, job: Job) -> Done:
        """Make the shards of a job; all of them are whole when this returns."""
        self._skipped, self._notices = Skipped(self._skip_bad), set[str]()
        self._sides: dict[Side, SideShards] = {
            "train": SideShards(self._folder, "train", job.number, self._dtype),
            "val": SideShards(self._folder, "val", job.number, self._dtype),
        }
        self._waiting: dict[Side, list[str]] = {"train": [], "val": []}
        self._names: dict[Side, list[str]] = {"train": [], "val": []}
        self._is_checked = False
        self._sides_of: dict[int, set[Side]] = {}
        self._marks = 0
        try:
            for piece in job.pieces:
                self._take(piece)
            for side in self._sides:
                self._flush(side)
                self._sides[side].close()
        except OSError as error:
            self._abandon()
            if error.errno not in files.FULL:
                raise
            where = Path(error.filename or self._folder).as_posix()
            raise RunError(
                f"{where}: the disk is full: make room; what is finished was kept, and the same "
                "command goes on"
            ) from None
        except BaseException:
            self._abandon()
            raise
        made = [shard for shards in self._sides.values() for shard in shards.made]
        skipped = self._skipped
        return Done(
            made,
            dict(skipped.counts),
            skipped.examples,
            sorted(self._notices | skipped.notices),
            self._encoder.name,
            {str(number): sorted(sides) for number, sides in sorted(self._sides_of.items())},
            self._marks,
        )

    def _abandon(self) -> None:
        for shards in self._sides.values():
            shards.abandon()

    def _take(self, piece: Piece) -> None:
        if holds_many(piece.source, self._form):
            self._take_documents(piece)
        elif piece.side is None and not piece.source.packing and piece.source.size <= WHOLE:
            self._take_whole(piece)
        else:
            self._take_long(piece)

    def _take_documents(self, piece: Piece) -> None:
        found = documents(
            piece.source, self._form, self._skipped, start=piece.start, stop=piece.stop
        )
        told = text_bytes = 0
        for document in found:
            self._add(piece.source, (piece.number, document.number), document.text)
            text_bytes += len(document.text)
            if text_bytes >= AT_ONCE:
                self._progress(document.reached - told, text_bytes)
                told, text_bytes = document.reached, 0
        self._progress(piece.weight - told, text_bytes)

    def _take_whole(self, piece: Piece) -> None:
        try:
            parts = list(chunks(piece.source, encoding=self._form.encoding))
        except BadInput as bad:
            self._skipped.add(bad)
            return
        text = "".join(chunk.text for chunk in parts)
        for chunk in parts:
            self._notice(piece.source, chunk)
        if text.strip():
            self._add(piece.source, (piece.number, 0), text)
        self._progress(piece.weight, len(text))

    def _take_long(self, piece: Piece) -> None:
        """A text that does not fit into memory, or a part of one: written as it is read."""
        source, form, side = piece.source, self._form, piece.side
        cut: int | None = None
        if side is None:
            try:
                facts = measure(source, form.encoding)
            except BadInput as bad:
                self._skipped.add(bad)
                return
            if facts.is_blank:
                return
            side = self._split.side((piece.number, 0), facts.digest)
            cut = self._split.cut if self._split.rule == "character" else None
        self._flush(side)
        is_first, told = piece.begins, 0
        for text, reached, is_held_out in self._long_parts(piece, cut):
            if is_held_out:
                side, is_first = "val", True
            self._sides_of.setdefault(piece.number, set()).add(side)
            self._marks += text.count(END_OF_TEXT)
            with _told_of(source.name):
                ids = self._encode(text)
            if is_first and self._split.marks:
                assert self._tokenizer.end_of_text is not None
                mark = np.array([self._tokenizer.end_of_text], self._dtype)
                self._sides[side].write(mark, documents=0, characters=0, n_bytes=0)
            self._write(side, ids, [text], documents=int(is_first))
            is_first = False
            self._progress(reached - told, len(text))
            told = reached
        self._progress(piece.weight - told, 0)

    def _long_parts(self, piece: Piece, cut: int | None) -> Iterator[tuple[str, int, bool]]:
        """Pieces of a long text that are encoded for themselves; at `cut` the other side begins."""
        kept, passed, begins = "", 0, False
        for chunk in chunks(
            piece.source, encoding=self._form.encoding, start=piece.start, stop=piece.stop
        ):
            self._notice(piece.source, chunk)
            text, passed_before = chunk.text, passed
            passed += len(text)
            if cut is not None and passed_before <= cut < passed:
                head = kept + text[: cut - passed_before]
                if head:
                    yield head, chunk.reached, begins
                kept, text, begins = "", text[cut - passed_before :], True
            since = max(1, len(kept) - 1)
            kept += text
            place = last_cleft(kept, since)
            if place is not None:
                yield kept[:place], chunk.reached, begins
                kept, begins = kept[place:], False
            elif len(kept) > UNBROKEN:
                raise UserError(
                    f"{piece.source.name}: {UNBROKEN:,} characters without a blank: this is no "
                    "text; leave the file out"
                )
        if kept:
            yield kept, piece.weight, begins

    def _notice(self, source: Source, chunk: Chunk) -> None:
        self._notices |= {f"{source.name}: {words}" for words in mended(chunk)}

    def _add(self, source: Source, place: tuple[int, int], text: str) -> None:
        if self._split.rule == "character":
            parts: list[tuple[Side, str]] = [
                ("train", text[: self._split.cut]),
                ("val", text[self._split.cut :]),
            ]
        else:
            is_by_hash = self._split.rule == "hash" or self._split.exceptions
            digest = digest_of(text) if is_by_hash else 0
            parts = [(self._split.side(place, digest), text)]
        for side, part in parts:
            if part:
                self._sides_of.setdefault(place[0], set()).add(side)
            self._marks += part.count(END_OF_TEXT)
            waiting = self._waiting[side]
            waiting.append(part)
            self._names[side].append(source.name)
            if len(part) >= AT_ONCE or sum(map(len, waiting)) >= AT_ONCE:
                self._flush(side)

    def _flush(self, side: Side) -> None:
        texts, self._waiting[side] = self._waiting[side], []
        names, self._names[side] = self._names[side], []
        if not texts:
            return
        try:
            if self._split.marks:
                self._check(texts[0])
                ids = self._encoder.encode_documents(texts)
            else:
                ids = np.concatenate([self._encode(text) for text in texts])
        except UserError:
            for name, text in zip(names, texts, strict=True):
                with _told_of(name):
                    self._encoder.encode(text)
            raise
        self._write(side, ids, texts, documents=len(texts))

    def _encode(self, text: str) -> Any:
        self._check(text)
        return self._encoder.encode(text)

    def _check(self, text: str) -> None:
        if not self._is_checked:
            self._encoder.agrees(text[:CHECKED])
            self._is_checked = True

    def _write(self, side: Side, ids: Any, texts: Sequence[str], *, documents: int) -> None:
        self._sides[side].write(
            ids,
            documents=documents,
            characters=sum(map(len, texts)),
            n_bytes=sum(
                len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts
            ),
        )


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Put the name of a file in front of what is wrong with its text."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def last_cleft(text: str, since: int = 1) -> int | None:
    """The last place, from `since` on, where a text may be cut so that no id changes, if any."""
    end = len(text)
    while end > since:
        begin = max(since, end - 4096)
        places = [match.start() for match in CLEFT.finditer(text, begin, end + 1)]
        if places:
            return places[-1]
        end = begin
    return None
