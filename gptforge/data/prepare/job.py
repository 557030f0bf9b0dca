"""One job of a preparation: encode spans of the input files into separate shards.

Jobs are independent, so the shards do not depend on the number of processes.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gptforge import tokenizers
from gptforge.data.input_errors import BadInputHandler
from gptforge.data.prepare.readers import FileSpan, read_split
from gptforge.data.prepare.split import SplitRule
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import SPLITS, SplitName
from gptforge.data.token_dataset import ShardWriter
from gptforge.errors import RunError, UserError, explain_os_error
from gptforge.tokenizers.base import END_OF_TEXT, Tokens, smallest_dtype
from gptforge.tokenizers.fast_encode import FastEncoder

PROGRESS_BYTES = 2**20  # of text, reported at a time
MAX_SHARD_TOKENS = 2**27
Progress = Callable[[int, int], None]
"""Called with the bytes of the files, and of their text, that are done since the last call."""


@dataclass(frozen=True)
class Job:
    """Spans that are encoded into separate shards."""

    index: int
    spans: tuple[FileSpan, ...]


@dataclass
class JobResult:
    """Results of a finished job, for the index."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  # count by problem
    examples: list[str] = field(default_factory=list)  # skipped input, with locations
    notices: list[str] = field(default_factory=list)  # what was repaired while reading
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
        fields.pop("encoder", None)  # written by earlier versions
        splits = {int(i): splits for i, splits in fields.pop("sides").items()}
        return cls(num_eot_literals=fields.pop("marks"), splits=splits, **fields)


class SplitWriter:
    """Writes the ids of one split of a job as shards, with `prefix` before each document."""

    def __init__(self, path: Path, split: SplitName, prefix: Tokens) -> None:
        self._path, self._split, self._prefix = path, split, prefix
        self._shard: ShardWriter | None = None
        self._counts = Counter[str]()
        self.shards: list[dict[str, Any]] = []  # records of the complete ones, for the index

    def add(self, ids: Tokens, text: str, *, starts_document: bool) -> int:
        """Write the ids of a document, or of a part of one; returns the bytes of the text."""
        if starts_document:
            ids = np.concatenate([self._prefix, ids])
        if self._shard is None:
            suffix = f"_{len(self.shards)}" if self.shards else ""
            self._shard = ShardWriter(Path(f"{self._path}{suffix}.bin"), self._prefix.dtype)
        self._shard.write(ids)
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8"))
        self._counts.update(
            documents=int(starts_document),
            characters=len(text),
            bytes=num_bytes,
            tokens=len(ids),
        )
        if self._counts["tokens"] >= MAX_SHARD_TOKENS:
            self.close()
        return num_bytes

    def abort(self) -> None:
        """Delete the open shard."""
        if self._shard is not None:
            self._shard.abort()

    def close(self) -> None:
        """Complete the open shard."""
        if self._shard is None:
            return
        name, sha256 = self._shard.path.name, self._shard.close()
        self.shards.append({"file": name, "split": self._split, "sha256": sha256, **self._counts})
        self._shard, self._counts = None, Counter[str]()


@dataclass(frozen=True)
class JobRunner:
    """Runs jobs one after the other; each worker process has a copy."""

    out_dir: Path
    tokenizer_file: Path
    split_rule: SplitRule
    text_format: TextFormat
    skip_bad: bool

    @functools.cached_property
    def _encoder(self) -> FastEncoder:
        return FastEncoder(tokenizers.load(self.tokenizer_file))

    def run(self, job: Job, progress: Progress) -> JobResult:
        """Write the shards of a job; all of them are complete when this returns.

        An exception of `progress` stops it.
        """
        out_dir, bad_input = self.out_dir, BadInputHandler(self.skip_bad)
        tokenizer = self._encoder.tokenizer
        prefix = [tokenizer.eot_token] if self.split_rule.prepend_eot else []
        ids: Tokens = np.array(prefix, smallest_dtype(tokenizer.vocab_size))
        writers = {s: SplitWriter(out_dir / f"{s}_{job.index:06d}", s, ids) for s in SPLITS}
        result = JobResult()
        try:
            for span in job.spans:
                self._encode(span, writers, result, bad_input, progress)
            for writer in writers.values():
                writer.close()
        except BaseException as error:
            for writer in writers.values():
                writer.abort()
            path = Path((isinstance(error, OSError) and error.filename) or out_dir)
            if not isinstance(error, OSError) or not path.is_relative_to(out_dir):
                raise
            reason, fix = explain_os_error(error)
            hint = "finished parts are kept, and the same command resumes"
            raise RunError(
                f"{path.as_posix()}: {reason}: {fix or 'check the disk'}; {hint}"
            ) from None
        result.shards = [shard for writer in writers.values() for shard in writer.shards]
        result.skipped, result.examples = dict(bad_input.counts), bad_input.examples
        result.notices = sorted(bad_input.notices)
        return result

    def _encode(
        self,
        span: FileSpan,
        writers: Mapping[SplitName, SplitWriter],
        result: JobResult,
        bad_input: BadInputHandler,
        progress: Progress,
    ) -> None:
        splits = set(result.splits.get(span.source_index, ()))
        reported = num_bytes = 0
        for part in read_split(span, self.split_rule, self.text_format, bad_input):
            try:
                ids = self._encoder.encode(part.text)
            except UserError as error:  # a character that the tokenizer lacks
                raise UserError(f"{span.source.name}: {error}") from None
            num_bytes += writers[part.split].add(
                ids, part.text, starts_document=part.starts_document
            )
            splits.add(part.split)
            result.num_eot_literals += part.text.count(END_OF_TEXT)
            if num_bytes >= PROGRESS_BYTES:
                progress(part.bytes_read - reported, num_bytes)
                reported, num_bytes = part.bytes_read, 0
        progress(span.num_bytes - reported, num_bytes)
        if splits:
            result.splits[span.source_index] = sorted(splits)
