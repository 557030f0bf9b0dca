"""Text of any kind and size into token shards: in constant memory, by all cores, once.

What is asked for, how far it has come and what it made all lie in the folder: shards appear whole,
each job leaves a note behind them, and the index comes last.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from gptforge import files, tokenizers
from gptforge.data.index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    VERIFIED_FILE,
    Index,
    find_corruption,
    json_sha256,
    mark_verified,
    read_index,
)
from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare.finalize import PreparedData, finalize, log_summary
from gptforge.data.prepare.job import Job, JobResult
from gptforge.data.prepare.partition import partition
from gptforge.data.prepare.request import (
    FileSelection,
    Log,
    NoProgressBar,
    PrepareRequest,
    ProgressBar,
    select_files,
)
from gptforge.data.prepare.scan import collect_alphabet, scan
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule
from gptforge.data.prepare.workers import num_cpus, run_in_process, run_in_workers
from gptforge.data.token_dataset import read_shard_header
from gptforge.errors import UserError
from gptforge.lock import LOCK_FILE, lock_folder
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import smallest_dtype
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

PROGRESS_DIR = ".preparing"
"""Folder with the notes of an unfinished preparation."""
REQUEST_FILE = ".request"
"""What was asked for, as a hash."""
MIN_PARALLEL_BYTES = 2**24
"""Bytes that are done sooner than other processes are started."""
PREPARE_VERSION = 1
"""Raised when the same request would give other tokens than before."""


def prepare(
    out_dir: Path,
    request: PrepareRequest,
    *,
    num_workers: int = 0,
    restart: bool = False,
    wait: bool = False,
    log: Log = lambda text: None,
    progress: ProgressBar | None = None,
) -> Index:
    """Make the shards, or go on making them; the same request on a finished folder does nothing.

    Args:
        out: folder of the shards.
        request: what is to be made of what.
        workers: processes; 0: one a core, where the data is large enough for them.
        restart: move aside what lies in the folder.
        wait: whether to wait for another process that prepares the same folder.
        say: told what should be known.
        meter: shows how far it is.

    Raises:
        UserError: for anything that the user can mend, or if the folder holds something else.
        RunError: if the disk is full; what is finished stays.
    """
    if not 0 <= request.val_fraction < 1:
        raise UserError(f"--val_fraction must be from 0 to below 1, not {request.val_fraction}")
    if request.cache_key and out_dir.is_file():
        # In the cache, nothing but a preparation belongs there.
        out_dir.unlink()
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out {out_dir} is a file: choose another")
    if out_dir.is_symlink() and not out_dir.exists():
        raise UserError(f"--out {out_dir} is a link that leads nowhere: choose another")
    held = lock_folder(out_dir, wait=wait)
    if held is None:
        raise UserError(f"{out_dir.as_posix()} is being prepared by another process: wait for it")
    with held:
        if restart and _holds_something(out_dir):
            _refuse_to_move_sources(out_dir, request)
            log(f"note: moved the old {out_dir} to {held.move_to_backup('old')}")
        return _Preparation(out_dir, request, num_workers, log, progress or NoProgressBar()).run()


class _Preparation:
    def __init__(
        self, out: Path, request: PrepareRequest, workers: int, say: Log, meter: ProgressBar
    ) -> None:
        self.out, self.request, self.workers = out, request, workers
        self.say, self.meter = say, meter
        self.notes = out / PROGRESS_DIR
        self._is_cache = bool(request.cache_key)
        self._was_finished = False
        self.only_source = ""
        """Its name, where there is only one."""

    def run(self) -> Index:
        is_fresh = not (self.out / REQUEST_FILE).is_file() and not self.notes.is_dir()
        self._was_finished = not self.notes.is_dir() and any(self.out.glob("*.bin"))
        if not self._is_cache:
            self._refuse_strangers()
        try:
            return self._run()
        except UserError as error:
            if is_fresh and not any(self.notes.glob("job-*")):
                # Refused before anything was made: no trace of it either.
                files.remove(self.notes)
                for name in (REQUEST_FILE, TOKENIZER_FILE):
                    (self.out / name).unlink(missing_ok=True)
            if isinstance(error, BadInputError) and error.problem.startswith(
                f"{self.only_source}: "
            ):
                # Without its only file nothing would be left.
                raise BadInputError(error.problem, error.hint, can_skip=False) from None
            raise

    def _run(self) -> Index:
        self._refuse_shards()
        self.notes.mkdir(parents=True, exist_ok=True)
        chosen = select_files(self.request, spool_dir=self.notes)
        sources = chosen.sources
        self.only_source = sources[0].name if len(sources) == 1 else ""
        key = self._key(chosen)
        if (index := self._finished(key)) is not None:
            files.remove(self.notes)
            return index
        self._begin(key)
        for notice in chosen.notices:
            self.say(f"note: {notice}")
        seen = scan(
            sources,
            self.request.text_format,
            self.request.val_fraction,
            skip_bad=self.request.skip_bad,
            val_sources=chosen.val_sources,
            split_duplicates=not self.request.split_by_name,
        )
        tokenizer = self._tokenizer(sources, seen.split_rule)
        split = seen.split_rule
        if split.prepend_eot and tokenizer.eot_token is None:
            self.say(
                f"note: {tokenizer.name} has no end-of-text mark: documents are not kept apart"
            )
            split = replace(split, prepend_eot=False)
        if self.request.raw_bin and smallest_dtype(tokenizer.vocab_size) is not np.uint16:
            raise UserError(f"--headerless holds uint16 ids, and {tokenizer.vocab_size} do not fit")
        tokenizers.save(tokenizer, self.out / TOKENIZER_FILE)
        skipped = BadInputHandler(self.request.skip_bad)
        jobs = partition(
            sources,
            seen,
            self.request.text_format,
            skipped,
            job_bytes=max(1, self.request.shard_bytes),
        )
        done = self._work(jobs, split)
        results = [done[job.index] for job in jobs]
        made = PreparedData(sources, split, tokenizer, results, skipped, seen.sha256, seen.notices)
        log_summary(made, self.say)
        index = finalize(self.out, made, raw_bin=self.request.raw_bin)
        mark_verified(index)
        files.remove(self.notes)
        return index

    def _refuse_strangers(self) -> None:
        """Whatever is there and not ours stays."""
        if self.notes.is_symlink():
            raise UserError(f"{self.notes.as_posix()} is a symbolic link: delete it")
        if (self.out / REQUEST_FILE).is_file() or self.notes.is_dir():
            return
        if _holds_something(self.out):
            raise UserError(
                f"--out {self.out} holds other files: choose another, or give --overwrite to move "
                "it aside"
            )

    def _refuse_shards(self) -> None:
        """They are what comes out, and not what goes in."""
        for name in self.request.names:
            if read_index(Path(name)) is not None:
                raise UserError(
                    f"{name} holds shards, prepared already: train on them with --input "
                    f"{quote(name)}, or name the texts that they were made of to prepare them in "
                    "another way"
                )

    def _key(self, chosen: FileSelection) -> str:
        asked, sources = self.request, chosen.sources
        if asked.cache_key:
            return asked.cache_key
        tokenizer = asked.tokenizer
        if not isinstance(tokenizer, str):
            tokenizer = json_sha256(tokenizer.to_json())
        elif Path(tokenizer).is_file():
            tokenizer = files.sha256(Path(tokenizer))
        return json_sha256(
            {
                "version": PREPARE_VERSION,
                "sources": [[s.name, s.kind, s.compression, s.size, s.stamp] for s in sources],
                "tokenizer": tokenizer,
                "form": asdict(asked.text_format),
                "how": [asked.val_fraction, asked.shard_bytes, asked.skip_bad, asked.raw_bin],
                **({"held_out": chosen.val_sources} if chosen.val_sources else {}),
            }
        )

    def _finished(self, key: str) -> Index | None:
        """What was made before, if it is this and intact; if it is damaged, it is made again."""
        is_same, damage = _read(self.out / REQUEST_FILE) == key, None
        try:
            index = read_index(self.out)
        except UserError as error:
            if not is_same and not self._is_cache:
                raise
            index, damage = None, str(error)
        if index is not None and not is_same and not self._is_cache:
            raise UserError(
                f"--out {self.out} holds data that was prepared from something else, or in another "
                "way: choose another, or give --overwrite to move it aside"
            )
        if index is not None:
            damage = find_corruption(index) if is_same else f"{REQUEST_FILE} is missing or damaged"
        elif self._was_finished:
            damage = damage or f"{INDEX_FILE} is missing"
        if damage is not None:
            self.say(f"note: {damage}: {self.out.as_posix()} is prepared again")
            self._discard()
            return None
        if index is not None and not self._is_cache:
            self.say(f"{self.out.as_posix()} is prepared already")
        return index

    def _discard(self) -> None:
        """Shards stay until the new ones replace them: a training may be reading them."""
        for name in (INDEX_FILE, VERIFIED_FILE, TOKENIZER_FILE):
            files.remove(self.out / name)
        for path in self.out.glob("*.bin"):
            if path.is_dir():
                files.remove(path)

    def _begin(self, key: str) -> None:
        """Keep what an unfinished preparation of the same made; of anything else, nothing."""
        if (before := _read(self.out / REQUEST_FILE)) and before != key:
            if any(self.notes.glob("job-*")):
                self.say("note: the data or the options have changed since: starting anew")
            for path in [*self.out.glob("*.bin"), *self.notes.glob("job-*")]:
                path.unlink()
        for path in self.out.glob(".*.partial.bin"):
            path.unlink()
        files.atomic_write(self.out / REQUEST_FILE, key)

    def _tokenizer(self, sources: Sequence[Source], split: SplitRule) -> Tokenizer:
        asked = self.request
        if not isinstance(asked.tokenizer, str):
            return asked.tokenizer
        if asked.tokenizer == "char":
            letters = collect_alphabet(sources, asked.text_format, skip_bad=asked.skip_bad)
            return CharTokenizer(letters, with_eot=split.prepend_eot)
        if asked.tokenizer == "byte":
            return ByteTokenizer(with_eot=split.prepend_eot)
        return tokenizers.from_name(asked.tokenizer, "")

    def _work(self, jobs: Sequence[Job], split: SplitRule) -> dict[int, JobResult]:
        done = {job.index: note for job in jobs if (note := self._noted(job)) is not None}
        if done:
            self.say(f"going on: {len(done)} of {len(jobs)} parts are finished")
        weights = {job.index: sum(piece.num_bytes for piece in job.spans) for job in jobs}
        self.meter.start(sum(weights.values()), sum(weights[number] for number in done))
        left = [job for job in jobs if job.index not in done]
        for job, made in self._results(left, split, sum(weights[job.index] for job in left)):
            text = json.dumps(made.to_json(), ensure_ascii=False)
            files.atomic_write(self.notes / f"job-{job.index:06d}.json", text)
            done[job.index] = made
        return done

    def _results(
        self, jobs: Sequence[Job], split: SplitRule, weight: int
    ) -> Iterator[tuple[Job, JobResult]]:
        workers = min(len(jobs), self.workers or num_cpus())
        tokenizer = self.out / TOKENIZER_FILE
        text_format, skip_bad, add = self.request.text_format, self.request.skip_bad, self.meter.add
        if workers <= 1 or (weight < MIN_PARALLEL_BYTES and not self.workers):
            return run_in_process(
                jobs,
                self.out,
                tokenizer,
                split_rule=split,
                text_format=text_format,
                skip_bad=skip_bad,
                progress=add,
            )
        return run_in_workers(
            jobs,
            self.out,
            tokenizer,
            split_rule=split,
            text_format=text_format,
            skip_bad=skip_bad,
            progress=add,
            num_workers=workers,
        )

    def _noted(self, job: Job) -> JobResult | None:
        """What a job made before, if it is all there."""
        text = _read(self.notes / f"job-{job.index:06d}.json")
        if not text:
            return None
        try:
            note = JobResult.from_json(json.loads(text))
            for shard in note.shards:
                path = self.out / shard["file"]
                if read_shard_header(path).num_tokens != shard["tokens"]:
                    return None
                if files.sha256(path) != shard["sha256"]:
                    return None
            return note
        except Exception:
            # Not a note that a job left: the job is done again.
            return None


def _refuse_to_move_sources(out: Path, request: PrepareRequest) -> None:
    named = [name for name in request.names if name != "-"]
    if isinstance(request.tokenizer, str) and Path(request.tokenizer).is_file():
        named.append(request.tokenizer)
    for name in named:
        if files.is_inside(out, name):
            raise UserError(
                f"--overwrite would move {out} aside with {name} in it: choose another --out, or "
                "put that elsewhere first"
            )


def _holds_something(folder: Path) -> bool:
    return any(path.name != LOCK_FILE for path in folder.iterdir())


def _read(path: Path) -> str:
    """A small file of a preparation; empty where there is none that can be read."""
    try:
        return files.read_text(path, follow_symlinks=False)
    except (OSError, ValueError):
        return ""
