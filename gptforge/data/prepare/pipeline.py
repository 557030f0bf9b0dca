"""Encode text of any kind and size into token shards, in constant memory.

All state is in the output folder: shards are renamed into place when they are complete, each job
writes its result, and the index is written last. So an interrupted preparation can resume.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from gptforge import files, tokenizers
from gptforge.data.input_errors import BadInputError, BadInputHandler
from gptforge.data.prepare.finalize import finalize
from gptforge.data.prepare.job import JobRunner
from gptforge.data.prepare.partition import partition
from gptforge.data.prepare.readers import FileSpan, read_split
from gptforge.data.prepare.request import FileSelection, PrepareRequest, ProgressBar, select_files
from gptforge.data.prepare.scan import collect_alphabet, scan
from gptforge.data.prepare.sources import Source
from gptforge.data.prepare.split import SplitRule
from gptforge.data.prepare.workers import run_jobs
from gptforge.data.shard_index import (
    INDEX_FILE,
    TOKENIZER_FILE,
    VERIFIED_FILE,
    Index,
    find_corruption,
    json_sha256,
    mark_verified,
    read_index,
)
from gptforge.errors import UserError
from gptforge.lock import LOCK_FILE, lock_folder
from gptforge.patterns import is_inside
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers.base import smallest_dtype
from gptforge.tokenizers.char import ByteTokenizer, CharTokenizer

logger = logging.getLogger(__name__)

PROGRESS_DIR = ".preparing"  # results of the jobs of an unfinished preparation
REQUEST_FILE = ".request"  # hash of the request
PREPARE_VERSION = 1  # increment it if the same request would give other tokens


def prepare(
    out_dir: Path,
    request: PrepareRequest,
    *,
    num_workers: int = 0,
    restart: bool = False,
    wait: bool = False,
    progress: ProgressBar | None = None,
) -> Index:
    """Write token shards, or resume; the same request on a finished folder does nothing.

    Args:
        out_dir: folder of the shards.
        request: what to prepare.
        num_workers: processes; 0 is one per CPU, if there is enough data for them.
        restart: move the old content of the folder away.
        wait: for another process that prepares the same folder.
        progress: shows the bytes that are done.

    Raises:
        UserError: for anything that the user can fix, or if the folder holds something else.
        RunError: if the disk is full; finished parts are kept.
    """
    if not 0 <= request.val_fraction < 1:
        raise UserError(f"--val_fraction must be from 0 to below 1, not {request.val_fraction}")
    if request.cache_key and out_dir.is_file():
        # Only this program writes to its cache: the file is there by mistake.
        out_dir.unlink()
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out {out_dir} is a file: choose another")
    if out_dir.is_symlink() and not out_dir.exists():
        raise UserError(f"--out {out_dir} is a broken link: choose another")
    lock = lock_folder(out_dir, wait=wait)
    if lock is None:
        raise UserError(f"{out_dir.as_posix()} is being prepared by another process: wait for it")
    with lock:
        if restart and _is_in_use(out_dir):
            _check_sources_stay(out_dir, request)
            logger.info(f"note: moved the old {out_dir} to {lock.move_to_backup('old')}")
        progress_dir = out_dir / PROGRESS_DIR
        is_started = (out_dir / REQUEST_FILE).is_file() or progress_dir.is_dir()
        _check_folder(out_dir, request, is_started=is_started)
        try:
            was_finished = not progress_dir.is_dir() and any(out_dir.glob("*.bin"))
            progress_dir.mkdir(parents=True, exist_ok=True)
            selection = request.selection or select_files(request, spool_dir=progress_dir)
            key = _request_key(request, selection)
            index = _find_finished(out_dir, request, key, was_finished=was_finished)
            if index is None:
                _discard_other_results(out_dir, key)
                index = _encode(out_dir, request, selection, num_workers, progress)
        except UserError:
            if not is_started and not any(progress_dir.glob("job-*")):
                # Failed before there was any result: leave no files behind.
                files.remove(progress_dir)
                for name in (REQUEST_FILE, TOKENIZER_FILE):
                    (out_dir / name).unlink(missing_ok=True)
            raise
        files.remove(progress_dir)
        return index


@contextlib.contextmanager
def no_skip_of_only_file(sources: Sequence[Source]) -> Iterator[None]:
    """Keep errors from suggesting to skip the only file, which would leave nothing."""
    try:
        yield
    except BadInputError as error:
        is_only_file = len(sources) == 1 and error.problem.startswith(f"{sources[0].name}: ")
        raise BadInputError(error.problem, error.hint, can_skip=not is_only_file) from None


def _check_folder(out_dir: Path, request: PrepareRequest, *, is_started: bool) -> None:
    if (link := out_dir / PROGRESS_DIR).is_symlink() and not request.cache_key:
        raise UserError(f"{link.as_posix()} is a symbolic link: delete it")
    if _is_in_use(out_dir) and not is_started and not request.cache_key:
        hint = "choose another, or give --restart to move them away"
        raise UserError(f"--out {out_dir} holds other files: {hint}")
    for name in request.names:
        if read_index(Path(name)) is not None:
            use = f"train on them with --input {quote(name)}"
            other = "name the texts that they were made of to prepare them differently"
            raise UserError(f"{name} holds shards, prepared already: {use}, or {other}")


def _encode(
    out_dir: Path,
    request: PrepareRequest,
    selection: FileSelection,
    num_workers: int,
    progress: ProgressBar | None,
) -> Index:
    sources, text_format = selection.sources, request.text_format
    for notice in selection.notices:
        logger.info(f"note: {notice}")
    with no_skip_of_only_file(sources):
        scanned = scan(request, selection)
        rule = scanned.split_rule
        tokenizer = _make_tokenizer(request, sources, rule)
        if rule.prepend_eot and tokenizer.eot_token is None:
            name = tokenizer.name
            logger.info(f"note: {name} has no end-of-text id: documents are not separated")
            rule = replace(rule, prepend_eot=False)
        if request.raw_bin and smallest_dtype(tokenizer.vocab_size) is not np.uint16:
            size = f"a vocabulary of {tokenizer.vocab_size}"
            raise UserError(f"--raw_bin stores ids as uint16, and {size} does not fit")
        path = out_dir / TOKENIZER_FILE
        used = _read(path)
        tokenizers.save(tokenizer, path)
        if _read(path) != used:
            # Another version of the package tokenizers may learn other merges than those that the
            # finished jobs were encoded with.
            for job in (out_dir / PROGRESS_DIR).glob("job-*"):
                job.unlink()
        jobs = partition(sources, scanned, text_format, job_bytes=max(1, request.shard_bytes))
        runner = JobRunner(out_dir, path, rule, text_format, request.skip_bad)
        results = run_jobs(jobs, runner, out_dir / PROGRESS_DIR, num_workers, progress)
    scanned = replace(scanned, split_rule=rule)
    index = finalize(out_dir, sources, scanned, tokenizer, results, raw_bin=request.raw_bin)
    mark_verified(index)
    return index


def _request_key(request: PrepareRequest, selection: FileSelection) -> str:
    if request.cache_key:
        return request.cache_key
    tokenizer = request.tokenizer
    if not isinstance(tokenizer, str):
        tokenizer = json_sha256(tokenizer.to_json())
    elif Path(tokenizer).is_file():
        tokenizer = files.sha256(Path(tokenizer))
    sources = [[s.name, s.kind, s.compression, s.size, s.stamp] for s in selection.sources]
    record = {
        "version": PREPARE_VERSION,
        "sources": sources,
        "tokenizer": tokenizer,
        "form": asdict(request.text_format),
        "how": [request.val_fraction, request.shard_bytes, request.skip_bad, request.raw_bin],
    }
    if tokenizer == "bpe":
        record["vocab_size"] = request.vocab_size
    if selection.val_sources:
        record["held_out"] = selection.val_sources
    return json_sha256(record)


def _find_finished(
    out_dir: Path, request: PrepareRequest, key: str, *, was_finished: bool
) -> Index | None:
    """The index if this request is finished; discards a corrupt one, refuses another's."""
    is_same, corruption = _read(out_dir / REQUEST_FILE) == key, None
    try:
        index = read_index(out_dir)
    except UserError as error:
        if not is_same and not request.cache_key:
            raise
        index, corruption = None, str(error)
    if index is not None:
        if not is_same and not request.cache_key:
            problem = "holds data that was prepared from something else, or differently"
            hint = "choose another, or give --restart to move it away"
            raise UserError(f"--out {out_dir} {problem}: {hint}")
        missing = f"{REQUEST_FILE} is missing or damaged"
        corruption = find_corruption(index) if is_same else missing
    elif was_finished:
        corruption = corruption or f"{INDEX_FILE} is missing"
    if corruption is None:
        if index is not None and not request.cache_key:
            logger.info(f"{out_dir.as_posix()} is prepared already")
        return index
    logger.info(f"note: {corruption}: {out_dir.as_posix()} is prepared again")
    # The shards stay until new ones replace them: a training run may be reading them.
    folders = [path for path in out_dir.glob("*.bin") if path.is_dir()]
    names = (INDEX_FILE, VERIFIED_FILE, TOKENIZER_FILE)
    for path in [*folders, *(out_dir / name for name in names)]:
        files.remove(path)
    return None


def _discard_other_results(out_dir: Path, key: str) -> None:
    """Delete the results of an unfinished preparation of another request."""
    if (old_key := _read(out_dir / REQUEST_FILE)) and old_key != key:
        if any((out_dir / PROGRESS_DIR).glob("job-*")):
            logger.info("note: the data or the options have changed: starting from scratch")
        for path in [*out_dir.glob("*.bin"), *(out_dir / PROGRESS_DIR).glob("job-*")]:
            path.unlink()
    for path in out_dir.glob(".*.partial.bin"):
        path.unlink()
    files.atomic_write(out_dir / REQUEST_FILE, key)


def _make_tokenizer(
    request: PrepareRequest, sources: Sequence[Source], rule: SplitRule
) -> Tokenizer:
    if not isinstance(request.tokenizer, str):
        return request.tokenizer
    if request.tokenizer == "char":
        alphabet = collect_alphabet(sources, request.text_format, skip_bad=request.skip_bad)
        return CharTokenizer(alphabet, with_eot=rule.prepend_eot)
    if request.tokenizer == "byte":
        return ByteTokenizer(with_eot=rule.prepend_eot)
    if request.tokenizer == "bpe":
        return learn_bpe(request, sources, rule)
    return tokenizers.from_name(request.tokenizer, "")


def learn_bpe(request: PrepareRequest, sources: Sequence[Source], rule: SplitRule) -> Tokenizer:
    """Learn the tokenizer of a request; equal texts give equal tokenizers.

    The text is read twice, to count its bytes and to learn.
    """
    from gptforge.estimate.formulas import default_vocab_size
    from gptforge.tokenizers.hf_bpe import train_bpe

    def training_text() -> Iterator[str]:
        bad_input = BadInputHandler(request.skip_bad)  # the jobs count it for the report
        for index, source in enumerate(sources):
            for part in read_split(FileSpan(index, source), rule, request.text_format, bad_input):
                if part.split == "train":
                    yield part.text

    num_bytes = sum(len(text.encode("utf-8")) for text in training_text())
    vocab_size = request.vocab_size or default_vocab_size(num_bytes)
    tokenizer = train_bpe(training_text(), vocab_size)
    size = "by --vocab_size" if request.vocab_size else "by the size of the text"
    if tokenizer.vocab_size < vocab_size:
        size = f"instead of {vocab_size:,}, since this text gives no more"
    logger.info(
        f"tokenizer: bpe, {tokenizer.vocab_size:,} ids {size}, learned from the "
        f"{num_bytes:,} bytes to train on"
    )
    return tokenizer


def _check_sources_stay(out_dir: Path, request: PrepareRequest) -> None:
    names = [name for name in request.names if name != "-"]
    if isinstance(request.tokenizer, str) and Path(request.tokenizer).is_file():
        names.append(request.tokenizer)
    for name in names:
        if is_inside(out_dir, name):
            hint = "choose another --out, or move that file first"
            raise UserError(f"--restart would move {out_dir} away with {name} in it: {hint}")


def _is_in_use(folder: Path) -> bool:
    return any(path.name != LOCK_FILE for path in folder.iterdir())


def _read(path: Path) -> str:
    """Return a small file's text; empty if it cannot be read."""
    try:
        return files.read_text(path, follow_symlinks=False)
    except (OSError, ValueError):
        return ""
