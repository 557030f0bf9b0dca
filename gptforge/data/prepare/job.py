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
from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.readers import has_many_documents, read_documents
from gptforge.data.prepare.scan import scan_text
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitName, SplitRule, text_digest
from gptforge.data.prepare.split_writer import BATCH_CHARS, SplitWriter
from gptforge.data.prepare.text_io import Chunk, TextFormat, describe_fixes, read_chunks
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.base import (
    END_OF_TEXT,
    SAFE_CUT,
    Tokenizer,
    smallest_dtype,
)
from gptforge.tokenizers.fast_encode import FastEncoder

SMALL_FILE_BYTES = 2**23
"""Bytes of a text file that is read whole."""
MAX_UNBROKEN_CHARS = 2**26
"""Characters without a blank that are still taken for text."""
SELF_CHECK_CHARS = 2**16
"""Characters at a job's beginning that both encoders are shown."""


@dataclass(frozen=True)
class FileSpan:
    """A file, or a part of one."""

    source_index: int
    """Of the source."""
    source: Source
    start: int = 0
    """Byte of a text or of JSON lines, row group of Parquet."""
    stop: int | None = None
    split: SplitName | None = None
    """Set where the piece is a part of one long text."""
    starts_document: bool = True
    """Whether a document begins with it."""
    num_bytes: int = 0
    """Bytes of the file that it stands for."""


@dataclass(frozen=True)
class Job:
    """Pieces that make shards of their own."""

    index: int
    spans: tuple[FileSpan, ...]


@dataclass
class JobResult:
    """What a job made: all that the index needs."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    encoder: str = ""
    splits: dict[str, list[SplitName]] = field(default_factory=dict)
    """By the number of a source, as text: the sides that text of it went to."""
    num_eot_literals: int = 0
    """Literal end-of-text marks in the text."""

    def to_json(self) -> dict[str, Any]:
        """As it is kept until all jobs are done."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "JobResult":
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


class JobRunner:
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
        out_dir: Path,
        tokenizer: Tokenizer,
        split_rule: SplitRule,
        text_format: TextFormat,
        *,
        skip_bad: bool,
        progress: Callable[[int, int], None] = lambda read, text: None,
    ) -> None:
        self._folder, self._split, self._form = out_dir, split_rule, text_format
        self._skip_bad, self._progress = skip_bad, progress
        self._tokenizer = tokenizer
        self._encoder = FastEncoder(tokenizer)
        self._dtype = smallest_dtype(tokenizer.vocab_size)

    def run(self, job: Job) -> JobResult:
        """Make the shards of a job; all of them are whole when this returns."""
        self._skipped, self._notices = BadInputHandler(self._skip_bad), set[str]()
        self._sides: dict[SplitName, SplitWriter] = {
            "train": SplitWriter(self._folder, "train", job.index, self._dtype),
            "val": SplitWriter(self._folder, "val", job.index, self._dtype),
        }
        self._waiting: dict[SplitName, list[str]] = {"train": [], "val": []}
        self._names: dict[SplitName, list[str]] = {"train": [], "val": []}
        self._is_checked = False
        self._sides_of: dict[int, set[SplitName]] = {}
        self._marks = 0
        try:
            for piece in job.spans:
                self._take(piece)
            for side in self._sides:
                self._flush(side)
                self._sides[side].close()
        except OSError as error:
            self._abandon()
            if error.errno not in files.DISK_FULL_ERRNOS:
                raise
            where = Path(error.filename or self._folder).as_posix()
            raise RunError(
                f"{where}: the disk is full: make room; what is finished was kept, and the same "
                "command goes on"
            ) from None
        except BaseException:
            self._abandon()
            raise
        made = [shard for shards in self._sides.values() for shard in shards.shards]
        skipped = self._skipped
        return JobResult(
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
            shards.abort()

    def _take(self, piece: FileSpan) -> None:
        if has_many_documents(piece.source, self._form):
            self._take_documents(piece)
        elif (
            piece.split is None
            and not piece.source.compression
            and piece.source.size <= SMALL_FILE_BYTES
        ):
            self._take_whole(piece)
        else:
            self._take_long(piece)

    def _take_documents(self, piece: FileSpan) -> None:
        found = read_documents(
            piece.source, self._form, self._skipped, start=piece.start, stop=piece.stop
        )
        told = text_bytes = 0
        for document in found:
            self._add(piece.source, (piece.source_index, document.index), document.text)
            text_bytes += len(document.text)
            if text_bytes >= BATCH_CHARS:
                self._progress(document.bytes_read - told, text_bytes)
                told, text_bytes = document.bytes_read, 0
        self._progress(piece.num_bytes - told, text_bytes)

    def _take_whole(self, piece: FileSpan) -> None:
        try:
            parts = list(read_chunks(piece.source, encoding=self._form.encoding))
        except BadInput as bad:
            self._skipped.handle(bad)
            return
        text = "".join(chunk.text for chunk in parts)
        for chunk in parts:
            self._notice(piece.source, chunk)
        if text.strip():
            self._add(piece.source, (piece.source_index, 0), text)
        self._progress(piece.num_bytes, len(text))

    def _take_long(self, piece: FileSpan) -> None:
        """A text that does not fit into memory, or a part of one: written as it is read."""
        source, text_format, side = piece.source, self._form, piece.split
        cut: int | None = None
        if side is None:
            try:
                facts = scan_text(source, text_format.encoding)
            except BadInput as bad:
                self._skipped.handle(bad)
                return
            if facts.is_blank:
                return
            side = self._split.assign((piece.source_index, 0), facts.digest)
            cut = self._split.cut if self._split.rule == "character" else None
        self._flush(side)
        is_first, told = piece.starts_document, 0
        for text, reached, is_held_out in self._long_parts(piece, cut):
            if is_held_out:
                side, is_first = "val", True
            self._sides_of.setdefault(piece.source_index, set()).add(side)
            self._marks += text.count(END_OF_TEXT)
            with _told_of(source.name):
                ids = self._encode(text)
            if is_first and self._split.prepend_eot:
                assert self._tokenizer.eot_token is not None
                mark = np.array([self._tokenizer.eot_token], self._dtype)
                self._sides[side].write(mark, num_documents=0, num_chars=0, num_bytes=0)
            self._write(side, ids, [text], documents=int(is_first))
            is_first = False
            self._progress(reached - told, len(text))
            told = reached
        self._progress(piece.num_bytes - told, 0)

    def _long_parts(self, piece: FileSpan, cut: int | None) -> Iterator[tuple[str, int, bool]]:
        """Pieces of a long text that are encoded for themselves; at `cut` the other side begins."""
        kept, passed, begins = "", 0, False
        for chunk in read_chunks(
            piece.source, encoding=self._form.encoding, start=piece.start, stop=piece.stop
        ):
            self._notice(piece.source, chunk)
            text, passed_before = chunk.text, passed
            passed += len(text)
            if cut is not None and passed_before <= cut < passed:
                head = kept + text[: cut - passed_before]
                if head:
                    yield head, chunk.bytes_read, begins
                kept, text, begins = "", text[cut - passed_before :], True
            since = max(1, len(kept) - 1)
            kept += text
            place = last_safe_cut(kept, since)
            if place is not None:
                yield kept[:place], chunk.bytes_read, begins
                kept, begins = kept[place:], False
            elif len(kept) > MAX_UNBROKEN_CHARS:
                raise UserError(
                    f"{piece.source.name}: {MAX_UNBROKEN_CHARS:,} characters without a blank: this is no "
                    "text; leave the file out"
                )
        if kept:
            yield kept, piece.num_bytes, begins

    def _notice(self, source: Source, chunk: Chunk) -> None:
        self._notices |= {f"{source.name}: {words}" for words in describe_fixes(chunk)}

    def _add(self, source: Source, place: tuple[int, int], text: str) -> None:
        if self._split.rule == "character":
            parts: list[tuple[SplitName, str]] = [
                ("train", text[: self._split.cut]),
                ("val", text[self._split.cut :]),
            ]
        else:
            is_by_hash = self._split.rule == "hash" or self._split.exceptions
            digest = text_digest(text) if is_by_hash else 0
            parts = [(self._split.assign(place, digest), text)]
        for side, part in parts:
            if part:
                self._sides_of.setdefault(place[0], set()).add(side)
            self._marks += part.count(END_OF_TEXT)
            waiting = self._waiting[side]
            waiting.append(part)
            self._names[side].append(source.name)
            if len(part) >= BATCH_CHARS or sum(map(len, waiting)) >= BATCH_CHARS:
                self._flush(side)

    def _flush(self, side: SplitName) -> None:
        texts, self._waiting[side] = self._waiting[side], []
        names, self._names[side] = self._names[side], []
        if not texts:
            return
        try:
            if self._split.prepend_eot:
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
            self._encoder.matches_reference(text[:SELF_CHECK_CHARS])
            self._is_checked = True

    def _write(self, side: SplitName, ids: Any, texts: Sequence[str], *, documents: int) -> None:
        self._sides[side].write(
            ids,
            num_documents=documents,
            num_chars=sum(map(len, texts)),
            num_bytes=sum(
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


def last_safe_cut(text: str, start: int = 1) -> int | None:
    """The last place, from `since` on, where a text may be cut so that no id changes, if any."""
    end = len(text)
    while end > start:
        begin = max(start, end - 4096)
        places = [match.start() for match in SAFE_CUT.finditer(text, begin, end + 1)]
        if places:
            return places[-1]
        end = begin
    return None
