"""Text of any kind and size into token shards: in constant memory, by all cores, once.

What is asked for, how far it has come and what it made all lie in the folder: shards appear whole,
each job leaves a note behind them, and the index comes last.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from gptforge import files, tokenizers
from gptforge.data.bad import Skipped
from gptforge.data.crew import do_here, do_together
from gptforge.data.documents import Form
from gptforge.data.index import SIDES, TOKENIZER, Index, read_index, write_index
from gptforge.data.job import Done, Job
from gptforge.data.jobs import divide
from gptforge.data.shards import HEADER_BYTES, read_header
from gptforge.data.sources import Kind, Source, find_sources
from gptforge.data.split import Split
from gptforge.data.survey import Survey, alphabet, survey
from gptforge.errors import UserError
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import smallest_dtype
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

NOTES = ".preparing"
"""Folder with the notes of an unfinished preparation."""
REQUEST = ".request"
"""What was asked for, as a hash."""
LITTLE = 2**24
"""Bytes that are done sooner than other processes are started."""
MOST_SOURCES = 1000
"""Files that the index names."""
VERSION = 1
"""Raised when the same request would give other tokens than before."""

Say = Callable[[str], None]


class Meter(Protocol):
    """Shows how far the work is."""

    def start(self, total: int, done: int) -> None:
        """So many bytes there are, and so many were done before."""
        ...

    def add(self, read: int, text: int) -> None:
        """So many more bytes of the files are done, and so many bytes of text."""
        ...


class Silent:
    """No meter."""

    def start(self, total: int, done: int) -> None:
        """Show nothing."""

    def add(self, read: int, text: int) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class Request:
    """What is to be made of what."""

    names: tuple[str, ...]
    """Files, folders, patterns, - for standard input."""
    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    form: Form = field(default_factory=Form)
    kind: Kind | Literal["auto"] = "auto"
    shard_bytes: int = 2**26
    """Bytes of the files that go into a shard, more or less."""
    skip_bad: bool = False
    headerless: bool = False
    """One file for each side, without a header, as nanoGPT reads them."""
    identity: str = ""
    """What tells this request from others; empty: names and dates of the files, and the rest."""


def prepare(
    out: Path,
    request: Request,
    *,
    workers: int = 0,
    overwrite: bool = False,
    wait: bool = False,
    say: Say = lambda text: None,
    meter: Meter | None = None,
) -> Index:
    """Make the shards, or go on making them; the same request on a finished folder does nothing.

    Args:
        out: folder of the shards.
        request: what is to be made of what.
        workers: processes; 0: one a core, where the data is large enough for them.
        overwrite: move aside what lies in the folder.
        wait: whether to wait for another process that prepares the same folder.
        say: told what should be known.
        meter: shows how far it is.

    Raises:
        UserError: for anything that the user can mend, or if the folder holds something else.
        RunError: if the disk is full; what is finished stays.
    """
    if not 0 <= request.val_fraction < 1:
        raise UserError(f"--val_fraction must be from 0 to below 1, not {request.val_fraction}")
    lock = files.hold(out, wait=wait)
    if lock is None:
        raise UserError(f"{out.as_posix()} is being prepared by another process: wait for it")
    with lock:
        return _Preparation(out, request, workers, overwrite, say, meter or Silent()).run()


class _Preparation:
    def __init__(
        self, out: Path, request: Request, workers: int, overwrite: bool, say: Say, meter: Meter
    ) -> None:
        self.out, self.request, self.workers = out, request, workers
        self.overwrite, self.say, self.meter = overwrite, say, meter
        self.notes = out / NOTES

    def run(self) -> Index:
        if self.overwrite and self.out.is_dir() and any(self.out.iterdir()):
            self.say(f"note: moved the old {self.out} to {files.set_aside(self.out, 'old')}")
        self._refuse_strangers()
        self.notes.mkdir(parents=True, exist_ok=True)
        sources = find_sources(self.request.names, kind=self.request.kind, spool=self.notes)
        key = self._key(sources)
        if (index := self._finished(key)) is not None:
            files.remove(self.notes)
            return index
        self._begin(key)
        seen = survey(
            sources,
            self.request.form,
            self.request.val_fraction,
            skip_bad=self.request.skip_bad,
        )
        tokenizer = self._tokenizer(sources, seen.split)
        split = seen.split
        if split.marks and tokenizer.end_of_text is None:
            self.say(
                f"note: {tokenizer.name} has no end-of-text mark: documents are not kept apart"
            )
            split = replace(split, marks=False)
        tokenizers.save(tokenizer, self.out / TOKENIZER)
        skipped = Skipped(self.request.skip_bad)
        jobs = divide(
            sources, seen, self.request.form, skipped, size=max(1, self.request.shard_bytes)
        )
        done = self._work(jobs, split)
        results = [done[job.number] for job in jobs]
        return self._finish(sources, seen, split, tokenizer, results, skipped)

    def _refuse_strangers(self) -> None:
        """Whatever is there and not ours stays."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: choose another")
        if not self.out.is_dir() or (self.out / REQUEST).is_file() or self.notes.is_dir():
            return
        if any(self.out.iterdir()):
            raise UserError(
                f"--out {self.out} holds other files: choose another, or give --overwrite to move "
                "it aside"
            )

    def _key(self, sources: Sequence[Source]) -> str:
        asked = self.request
        if asked.identity:
            return asked.identity
        tokenizer = asked.tokenizer
        if not isinstance(tokenizer, str):
            tokenizer = hash_of(tokenizer.to_json())
        elif Path(tokenizer).is_file():
            tokenizer = files.sha256(Path(tokenizer))
        return hash_of(
            {
                "version": VERSION,
                "sources": [[s.name, s.kind, s.packing, s.size, s.stamp] for s in sources],
                "tokenizer": tokenizer,
                "form": asdict(asked.form),
                "how": [asked.val_fraction, asked.shard_bytes, asked.skip_bad, asked.headerless],
            }
        )

    def _finished(self, key: str) -> Index | None:
        index = read_index(self.out)
        if index is None:
            return None
        if _read(self.out / REQUEST) != key:
            raise UserError(
                f"--out {self.out} holds data that was prepared from something else, or in another "
                "way: choose another, or give --overwrite to move it aside"
            )
        if not self.request.identity:
            self.say(f"{self.out.as_posix()} is prepared already")
        return index

    def _begin(self, key: str) -> None:
        """Keep what an unfinished preparation of the same made; of anything else, nothing."""
        if (before := _read(self.out / REQUEST)) and before != key:
            self.say("note: the data or the options have changed since: starting anew")
            for path in [*self.out.glob("*.bin"), *self.notes.glob("job-*")]:
                path.unlink()
        for path in self.out.glob(".*.partial.bin"):
            path.unlink()
        files.write_atomic(self.out / REQUEST, key)

    def _tokenizer(self, sources: Sequence[Source], split: Split) -> Tokenizer:
        asked = self.request
        if not isinstance(asked.tokenizer, str):
            return asked.tokenizer
        if asked.tokenizer == "char":
            letters = alphabet(sources, asked.form, skip_bad=asked.skip_bad)
            return CharTokenizer(letters, marks=split.marks)
        if asked.tokenizer == "byte":
            return ByteTokenizer(marks=split.marks)
        return tokenizers.named(asked.tokenizer, "")

    def _work(self, jobs: Sequence[Job], split: Split) -> dict[int, Done]:
        done = {job.number: note for job in jobs if (note := self._noted(job)) is not None}
        if done:
            self.say(f"going on: {len(done)} of {len(jobs)} parts are finished")
        weights = {job.number: sum(piece.weight for piece in job.pieces) for job in jobs}
        self.meter.start(sum(weights.values()), sum(weights[number] for number in done))
        left = [job for job in jobs if job.number not in done]
        for job, made in self._results(left, split, sum(weights[job.number] for job in left)):
            text = json.dumps(made.to_json(), ensure_ascii=False)
            files.write_atomic(self.notes / f"job-{job.number:06d}.json", text)
            done[job.number] = made
        return done

    def _results(
        self, jobs: Sequence[Job], split: Split, weight: int
    ) -> Iterator[tuple[Job, Done]]:
        workers = min(len(jobs), self.workers or cores())
        tokenizer = self.out / TOKENIZER
        form, skip_bad, add = self.request.form, self.request.skip_bad, self.meter.add
        if workers <= 1 or (weight < LITTLE and not self.workers):
            return do_here(
                jobs, self.out, tokenizer, split=split, form=form, skip_bad=skip_bad, progress=add
            )
        return do_together(
            jobs,
            self.out,
            tokenizer,
            split=split,
            form=form,
            skip_bad=skip_bad,
            progress=add,
            workers=workers,
        )

    def _noted(self, job: Job) -> Done | None:
        """What a job made before, if it is all there."""
        text = _read(self.notes / f"job-{job.number:06d}.json")
        if not text:
            return None
        try:
            note = Done(**json.loads(text))
            for shard in note.shards:
                if read_header(self.out / shard["file"]).tokens != shard["tokens"]:
                    return None
        except (ValueError, TypeError, KeyError, UserError):
            return None
        return note

    def _finish(
        self,
        sources: Sequence[Source],
        seen: Survey,
        split: Split,
        tokenizer: Tokenizer,
        results: Sequence[Done],
        skipped: Skipped,
    ) -> Index:
        shards = [shard for result in results for shard in result.shards]
        splits = {side: _sums(shards, side) for side in SIDES}
        digest = seen.sha256 or hash_of([tokenizer.to_json(), [s["sha256"] for s in shards]])
        counts: Counter[str] = Counter(skipped.counts)
        for result in results:
            counts.update(result.skipped)
        self._tell(results, skipped, counts)
        if not splits["train"]["tokens"]:
            raise UserError("no text was left to learn")
        if self.request.headerless:
            shards = _headerless(self.out, shards, tokenizer)
        index = write_index(
            self.out,
            {
                "tokenizer": {
                    "name": tokenizer.name,
                    "size": tokenizer.size,
                    "end_of_text": tokenizer.end_of_text,
                    "sha256": hash_of(tokenizer.to_json()),
                },
                "dtype": np.dtype(smallest_dtype(tokenizer.size)).name,
                "layout": "headerless" if self.request.headerless else "llm.c",
                "split": split.to_json(),
                "digest": digest,
                "splits": splits,
                "shards": shards,
                "sources": [
                    {"path": source.name, "bytes": source.size} for source in sources[:MOST_SOURCES]
                ],
                "files": len(sources),
                "skipped": dict(sorted(counts.items())),
                "notices": sorted({n for result in results for n in result.notices})[:20],
            },
        )
        if self.request.headerless:
            for result in results:
                for shard in result.shards:
                    (self.out / shard["file"]).unlink(missing_ok=True)
        files.remove(self.notes)
        return index

    def _tell(self, results: Sequence[Done], skipped: Skipped, counts: Counter[str]) -> None:
        notices = sorted({notice for result in results for notice in result.notices})
        for notice in notices[:5]:
            self.say(f"note: {notice}")
        if len(notices) > 5:
            self.say(f"note: and so in {len(notices) - 5} more cases")
        if counts:
            listed = ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
            self.say(f"note: left out: {listed}")
            examples = [*skipped.examples, *(e for result in results for e in result.examples)]
            for example in examples[:5]:
                self.say(f"note: left out {example}")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sums(shards: Sequence[dict[str, Any]], side: str) -> dict[str, int]:
    mine = [shard for shard in shards if shard["split"] == side]
    names = ("documents", "characters", "bytes", "tokens")
    return {name: sum(shard[name] for shard in mine) for name in names}


def _headerless(
    out: Path, shards: Sequence[dict[str, Any]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """All shards of a side as one file without a header: train.bin and val.bin."""
    if smallest_dtype(tokenizer.size) is not np.uint16:
        raise UserError(f"--headerless holds uint16 ids, and {tokenizer.size} do not fit")
    made = []
    for side in SIDES:
        mine = [shard for shard in shards if shard["split"] == side]
        if not mine:
            continue
        path = out / f"{side}.bin"
        with files.replacing(path) as partial, partial.open("wb") as whole:
            for shard in mine:
                with (out / shard["file"]).open("rb") as part:
                    part.seek(HEADER_BYTES)
                    while block := part.read(2**20):
                        whole.write(block)
        facts = {"file": path.name, "split": side, "sha256": files.sha256(path)}
        made.append({**facts, **_sums(mine, side)})
    return made


def hash_of(value: object) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
