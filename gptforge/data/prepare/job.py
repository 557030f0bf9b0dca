"""One job of a preparation: encode spans of the input files into separate shards.

Jobs are independent, so the shards do not depend on the number of processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptforge import files, tokenizers
from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.split import SplitName, SplitRule
from gptforge.data.prepare.split_reader import FileSpan, read_split
from gptforge.data.prepare.split_writer import SplitWriter
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import RunError
from gptforge.tokenizers.base import END_OF_TEXT
from gptforge.tokenizers.fast_encode import FastEncoder

PROGRESS_CHARS = 2**20  # reported at a time


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
        """Read a record of `to_json`."""
        fields = dict(record)
        splits = {int(i): splits for i, splits in fields.pop("sides").items()}
        return cls(num_eot_literals=fields.pop("marks"), splits=splits, **fields)


class JobRunner:
    """Runs jobs one after the other; an exception of `progress` stops a job."""

    def __init__(self, settings: JobSettings, progress: Callable[[int, int], None]) -> None:
        self._settings, self._progress = settings, progress
        self._tokenizer = tokenizers.load(settings.tokenizer_file)
        self._encoder = FastEncoder(self._tokenizer)

    def run(self, job: Job) -> JobResult:
        """Write the shards of a job; all of them are complete when this returns.

        Raises:
            UserError: for input that is not usable text.
            RunError: if the disk is full.
        """
        out_dir, result = self._settings.out_dir, JobResult()
        bad_input = BadInputHandler(self._settings.skip_bad)
        prepend_eot = self._settings.split_rule.prepend_eot
        common = (job.index, self._tokenizer, self._encoder, prepend_eot)
        splits: tuple[SplitName, ...] = ("train", "val")
        writers = {split: SplitWriter(out_dir, split, *common) for split in splits}
        try:
            for span in job.spans:
                self._encode(span, writers, result, bad_input)
            for writer in writers.values():
                writer.close()
                result.shards += writer.shards
        except BaseException as error:
            for writer in writers.values():
                writer.abort()
            if not isinstance(error, OSError) or error.errno not in files.DISK_FULL_ERRNOS:
                raise
            path = Path(error.filename or out_dir).as_posix()
            hint = "free some space; finished parts are kept, and the same command resumes"
            raise RunError(f"{path}: the disk is full: {hint}") from None
        result.skipped, result.examples = dict(bad_input.counts), bad_input.examples
        result.notices, result.encoder = sorted(bad_input.notices), self._encoder.name
        return result

    def _encode(
        self,
        span: FileSpan,
        writers: Mapping[SplitName, SplitWriter],
        result: JobResult,
        bad_input: BadInputHandler,
    ) -> None:
        splits, reported, num_chars = set[SplitName](), 0, 0
        rule, text_format = self._settings.split_rule, self._settings.text_format
        for part in read_split(span, rule, text_format, bad_input):
            writers[part.split].add(
                part.text, span.source.name, starts_document=part.starts_document
            )
            splits.add(part.split)
            result.num_eot_literals += part.text.count(END_OF_TEXT)
            num_chars += len(part.text)
            if num_chars >= PROGRESS_CHARS:
                self._progress(part.bytes_read - reported, num_chars)
                reported, num_chars = part.bytes_read, 0
        self._progress(span.num_bytes - reported, num_chars)
        if splits:
            known = result.splits.get(span.source_index, [])
            result.splits[span.source_index] = sorted(splits.union(known))
