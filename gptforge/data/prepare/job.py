"""One job of a preparation: encode spans of the input files into separate shards.

Jobs are independent, so the shards do not depend on the number of processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptforge import files, tokenizers
from gptforge.data.input_errors import BadInput, BadInputHandler
from gptforge.data.prepare.readers import has_many_documents, read_documents
from gptforge.data.prepare.scan import scan_text
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitName, SplitRule, text_digest
from gptforge.data.prepare.split_writer import SplitWriter
from gptforge.data.prepare.text_io import Chunk, TextFormat, describe_fixes, read_chunks
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.base import END_OF_TEXT, SAFE_CUT
from gptforge.tokenizers.fast_encode import FastEncoder

PROGRESS_CHARS = 2**20  # reported at a time
SMALL_FILE_BYTES = 2**23  # text files up to this size are read into memory
MAX_UNBROKEN_CHARS = 2**26  # a longer run without whitespace is not text


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
class Job:
    """Spans that are encoded into separate shards."""

    index: int
    spans: tuple[FileSpan, ...]


@dataclass(frozen=True)
class JobSettings:
    """Settings common to all jobs of a preparation."""

    out_dir: Path
    tokenizer_file: Path
    split_rule: SplitRule
    text_format: TextFormat
    skip_bad: bool


@dataclass
class JobResult:
    """Results of a finished job, for the index."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # count by problem
    examples: list[str] = field(default_factory=list)  # skipped input, with locations
    notices: list[str] = field(default_factory=list)  # what was repaired while reading
    encoder: str = ""
    splits: dict[int, list[SplitName]] = field(default_factory=dict)  # source index to splits
    num_eot_literals: int = 0  # end-of-text marks in the text, as plain characters

    def to_json(self) -> dict[str, Any]:
        """Return the record of a finished job, from which an interrupted preparation resumes."""
        record = asdict(self)
        return record | {"sides": record.pop("splits"), "marks": record.pop("num_eot_literals")}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "JobResult":
        """Read a record of `to_json`; raises some exception for anything else."""
        fields = dict(record)
        fields["splits"] = {int(i): splits for i, splits in fields.pop("sides").items()}
        result = cls(num_eot_literals=fields.pop("marks"), **fields)
        texts = [result.encoder, *result.examples, *result.notices]
        counts = [*result.skipped.values(), result.num_eot_literals]
        for shard in result.shards:
            texts += [shard["file"], shard["sha256"]]
            counts += [shard[name] for name in ("documents", "characters", "bytes", "tokens")]
            if Path(shard["file"]).name != shard["file"] or shard["split"] not in ("train", "val"):
                raise ValueError("not a shard of this folder")
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected a string")
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise TypeError("expected a count")
        return result


class JobRunner:
    """Runs jobs one after the other; an exception of `progress` stops a job."""

    def __init__(self, settings: JobSettings, progress: Callable[[int, int], None]) -> None:
        self._settings, self._progress = settings, progress
        self._split_rule, self._text_format = settings.split_rule, settings.text_format
        self._tokenizer = tokenizers.load(settings.tokenizer_file)
        self._encoder = FastEncoder(self._tokenizer)

    def run(self, job: Job) -> JobResult:
        """Write the shards of a job; all of them are complete when this returns.

        Raises:
            UserError: for input that is not usable text.
            RunError: if the disk is full.
        """
        out_dir = self._settings.out_dir
        self._bad_input = BadInputHandler(self._settings.skip_bad)
        self._splits: dict[int, set[SplitName]] = {}
        self._num_eot_literals = 0
        common = (job.index, self._tokenizer, self._encoder, self._split_rule.prepend_eot)
        splits: tuple[SplitName, ...] = ("train", "val")
        self._writers = {split: SplitWriter(out_dir, split, *common) for split in splits}
        try:
            for span in job.spans:
                self._encode_span(span)
            for writer in self._writers.values():
                writer.close()
        except BaseException as error:
            for writer in self._writers.values():
                writer.abort()
            if not isinstance(error, OSError) or error.errno not in files.DISK_FULL_ERRNOS:
                raise
            path = Path(error.filename or out_dir).as_posix()
            hint = "free some space; finished parts are kept, and the same command resumes"
            raise RunError(f"{path}: the disk is full: {hint}") from None
        return JobResult(
            [shard for writer in self._writers.values() for shard in writer.shards],
            dict(self._bad_input.counts),
            self._bad_input.examples,
            sorted(self._bad_input.notices),
            self._encoder.name,
            {index: sorted(splits) for index, splits in sorted(self._splits.items())},
            self._num_eot_literals,
        )

    def _encode_span(self, span: FileSpan) -> None:
        source = span.source
        try:
            if has_many_documents(source, self._text_format):
                self._encode_documents(span)
            elif span.split or source.compression or source.size > SMALL_FILE_BYTES:
                self._encode_long_text(span)
            else:
                self._encode_small_file(span)
        except BadInput as bad:
            self._bad_input.handle(bad)

    def _encode_documents(self, span: FileSpan) -> None:
        reported = text_bytes = 0
        for document in read_documents(
            span.source, self._text_format, self._bad_input, start=span.start, stop=span.stop
        ):
            self._add_document(span, document.index, document.text)
            text_bytes += len(document.text)
            if text_bytes >= PROGRESS_CHARS:
                self._progress(document.bytes_read - reported, text_bytes)
                reported, text_bytes = document.bytes_read, 0
        self._progress(span.num_bytes - reported, text_bytes)

    def _encode_small_file(self, span: FileSpan) -> None:
        chunks = list(read_chunks(span.source, encoding=self._text_format.encoding))
        for chunk in chunks:
            self._note_fixes(span.source, chunk)
        text = "".join(chunk.text for chunk in chunks)
        if text.strip():
            self._add_document(span, 0, text)
        self._progress(span.num_bytes, len(text))

    def _encode_long_text(self, span: FileSpan) -> None:
        """Encode a text that may not fit into memory, or a part of one, while reading it.

        It is cut where its ids are those of the parts, concatenated.
        """
        encoding, rule = self._text_format.encoding, self._split_rule
        split: SplitName = span.split or "train"
        cut = None
        if span.split is None:
            stats = scan_text(span.source, encoding)
            if stats.is_blank:
                return
            split = rule.assign((span.source_index, 0), stats.digest)
            cut = rule.cut if rule.rule == "character" else None
        starts_document, pending, num_chars, reported = span.starts_document, "", 0, 0

        def add(text: str) -> None:
            nonlocal starts_document
            if text:
                self._count(span, split, text)
                writer = self._writers[split]
                writer.add(text, span.source.name, starts_document=starts_document)
                starts_document = False

        for chunk in read_chunks(span.source, encoding=encoding, start=span.start, stop=span.stop):
            self._note_fixes(span.source, chunk)
            text = chunk.text
            if cut is not None and 0 <= cut - num_chars < len(text):
                add(pending + text[: cut - num_chars])
                pending, text = "", text[cut - num_chars :]
                split, starts_document = "val", True
            num_chars += len(chunk.text)
            # A space at the old end may become a safe cut by the character after it.
            search_start = max(1, len(pending) - 1)
            pending += text
            if (position := last_safe_cut(pending, search_start)) is not None:
                add(pending[:position])
                pending = pending[position:]
            elif len(pending) > MAX_UNBROKEN_CHARS:
                problem = f"{MAX_UNBROKEN_CHARS:,} characters without a space"
                raise UserError(f"{span.source.name}: {problem}: this is not text; leave it out")
            self._progress(chunk.bytes_read - reported, len(chunk.text))
            reported = chunk.bytes_read
        add(pending)
        self._progress(span.num_bytes - reported, 0)

    def _add_document(self, span: FileSpan, document_index: int, text: str) -> None:
        rule = self._split_rule
        parts: list[tuple[SplitName, str]]
        if rule.rule == "character":
            parts = [("train", text[: rule.cut]), ("val", text[rule.cut :])]
        else:
            # Hashing every document costs time, and few rules need it.
            digest = text_digest(text) if rule.rule == "hash" or rule.exceptions else 0
            parts = [(rule.assign((span.source_index, document_index), digest), text)]
        for split, part in parts:
            if part:
                self._count(span, split, part)
            self._writers[split].add(part, span.source.name)

    def _count(self, span: FileSpan, split: SplitName, text: str) -> None:
        self._splits.setdefault(span.source_index, set()).add(split)
        self._num_eot_literals += text.count(END_OF_TEXT)

    def _note_fixes(self, source: Source, chunk: Chunk) -> None:
        self._bad_input.notices |= {f"{source.name}: {fix}" for fix in describe_fixes(chunk)}


def last_safe_cut(text: str, start: int = 1) -> int | None:
    """Find the last index, at least `start`, where cutting a text changes none of its ids."""
    end = len(text)
    while end > start:
        begin = max(start, end - 4096)
        cuts = [match.start() for match in SAFE_CUT.finditer(text, begin, end + 1)]
        if cuts:
            return cuts[-1]
        end = begin
    return None
