"""Text of any kind and size into token shards: in constant memory, by all cores, once.

What is asked for, how far it has come and what it made all lie in the folder: shards appear whole,
each job leaves a note behind them, and the index comes last.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from gptforge import files, tokenizers
from gptforge.data.bad import RefusedError, Skipped
from gptforge.data.chosen import Chosen, choose
from gptforge.data.crew import do_here, do_together
from gptforge.data.finishing import Made, finish, tell
from gptforge.data.index import INDEX, TOKENIZER, Index, hash_of, read_index
from gptforge.data.job import Done, Job
from gptforge.data.jobs import divide
from gptforge.data.request import Meter, Request, Say, Silent
from gptforge.data.shards import read_header
from gptforge.data.sources import Source
from gptforge.data.split import Split
from gptforge.data.survey import alphabet, survey
from gptforge.data.verify import STAMP, find_damage, write_stamp
from gptforge.errors import UserError
from gptforge.holding import LOCK, hold
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import smallest_dtype
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

NOTES = ".preparing"
"""Folder with the notes of an unfinished preparation."""
REQUEST = ".request"
"""What was asked for, as a hash."""
LITTLE = 2**24
"""Bytes that are done sooner than other processes are started."""
VERSION = 1
"""Raised when the same request would give other tokens than before."""


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
    if request.identity and out.is_file():
        # In the cache, nothing but a preparation belongs there.
        out.unlink()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: choose another")
    if out.is_symlink() and not out.exists():
        raise UserError(f"--out {out} is a link that leads nowhere: choose another")
    held = hold(out, wait=wait)
    if held is None:
        raise UserError(f"{out.as_posix()} is being prepared by another process: wait for it")
    with held:
        if overwrite and _holds_something(out):
            _refuse_to_move_sources(out, request)
            say(f"note: moved the old {out} to {held.set_aside('old')}")
        return _Preparation(out, request, workers, say, meter or Silent()).run()


class _Preparation:
    def __init__(self, out: Path, request: Request, workers: int, say: Say, meter: Meter) -> None:
        self.out, self.request, self.workers = out, request, workers
        self.say, self.meter = say, meter
        self.notes = out / NOTES
        self._is_cache = bool(request.identity)
        self._was_finished = False
        self.only_source = ""
        """Its name, where there is only one."""

    def run(self) -> Index:
        is_fresh = not (self.out / REQUEST).is_file() and not self.notes.is_dir()
        self._was_finished = not self.notes.is_dir() and any(self.out.glob("*.bin"))
        if not self._is_cache:
            self._refuse_strangers()
        try:
            return self._run()
        except UserError as error:
            if is_fresh and not any(self.notes.glob("job-*")):
                # Refused before anything was made: no trace of it either.
                files.remove(self.notes)
                for name in (REQUEST, TOKENIZER):
                    (self.out / name).unlink(missing_ok=True)
            if isinstance(error, RefusedError) and error.what.startswith(f"{self.only_source}: "):
                # Without its only file nothing would be left.
                raise RefusedError(error.what, error.remedy, leaves_some=False) from None
            raise

    def _run(self) -> Index:
        self._refuse_shards()
        self.notes.mkdir(parents=True, exist_ok=True)
        chosen = choose(self.request, spool_folder=self.notes)
        sources = chosen.sources
        self.only_source = sources[0].name if len(sources) == 1 else ""
        key = self._key(chosen)
        if (index := self._finished(key)) is not None:
            files.remove(self.notes)
            return index
        self._begin(key)
        for notice in chosen.notices:
            self.say(f"note: {notice}")
        seen = survey(
            sources,
            self.request.form,
            self.request.val_fraction,
            skip_bad=self.request.skip_bad,
            held_out=chosen.held_out,
            part_copies=not self.request.split_by_name,
        )
        tokenizer = self._tokenizer(sources, seen.split)
        split = seen.split
        if split.marks and tokenizer.end_of_text is None:
            self.say(
                f"note: {tokenizer.name} has no end-of-text mark: documents are not kept apart"
            )
            split = replace(split, marks=False)
        if self.request.headerless and smallest_dtype(tokenizer.size) is not np.uint16:
            raise UserError(f"--headerless holds uint16 ids, and {tokenizer.size} do not fit")
        tokenizers.save(tokenizer, self.out / TOKENIZER)
        skipped = Skipped(self.request.skip_bad)
        jobs = divide(
            sources, seen, self.request.form, skipped, size=max(1, self.request.shard_bytes)
        )
        done = self._work(jobs, split)
        results = [done[job.number] for job in jobs]
        made = Made(sources, split, tokenizer, results, skipped, seen.sha256, seen.notices)
        tell(made, self.say)
        index = finish(self.out, made, headerless=self.request.headerless)
        write_stamp(index)
        files.remove(self.notes)
        return index

    def _refuse_strangers(self) -> None:
        """Whatever is there and not ours stays."""
        if self.notes.is_symlink():
            raise UserError(f"{self.notes.as_posix()} is a symbolic link: delete it")
        if (self.out / REQUEST).is_file() or self.notes.is_dir():
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

    def _key(self, chosen: Chosen) -> str:
        asked, sources = self.request, chosen.sources
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
                **({"held_out": chosen.held_out} if chosen.held_out else {}),
            }
        )

    def _finished(self, key: str) -> Index | None:
        """What was made before, if it is this and intact; if it is damaged, it is made again."""
        is_same, damage = _read(self.out / REQUEST) == key, None
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
            damage = find_damage(index) if is_same else f"{REQUEST} is missing or damaged"
        elif self._was_finished:
            damage = damage or f"{INDEX} is missing"
        if damage is not None:
            self.say(f"note: {damage}: {self.out.as_posix()} is prepared again")
            self._discard()
            return None
        if index is not None and not self._is_cache:
            self.say(f"{self.out.as_posix()} is prepared already")
        return index

    def _discard(self) -> None:
        """Shards stay until the new ones replace them: a training may be reading them."""
        for name in (INDEX, STAMP, TOKENIZER):
            files.remove(self.out / name)
        for path in self.out.glob("*.bin"):
            if path.is_dir():
                files.remove(path)

    def _begin(self, key: str) -> None:
        """Keep what an unfinished preparation of the same made; of anything else, nothing."""
        if (before := _read(self.out / REQUEST)) and before != key:
            if any(self.notes.glob("job-*")):
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
            note = Done.from_json(json.loads(text))
            for shard in note.shards:
                path = self.out / shard["file"]
                if read_header(path).tokens != shard["tokens"]:
                    return None
                if files.sha256(path) != shard["sha256"]:
                    return None
            return note
        except Exception:
            # Not a note that a job left: the job is done again.
            return None


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _refuse_to_move_sources(out: Path, request: Request) -> None:
    named = [name for name in request.names if name != "-"]
    if isinstance(request.tokenizer, str) and Path(request.tokenizer).is_file():
        named.append(request.tokenizer)
    for name in named:
        if files.lies_in(out, name):
            raise UserError(
                f"--overwrite would move {out} aside with {name} in it: choose another --out, or "
                "put that elsewhere first"
            )


def _holds_something(folder: Path) -> bool:
    return any(path.name != LOCK for path in folder.iterdir())


def _read(path: Path) -> str:
    """A small file of a preparation; empty where there is none that can be read."""
    try:
        return files.read_small(path, follow_symlinks=False)
    except (OSError, ValueError):
        return ""
