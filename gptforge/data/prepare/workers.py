"""Jobs done by several processes: started afresh, told to stop, never left behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gptforge import tokenizers
from gptforge.data.prepare.job import Job, JobResult, JobRunner
from gptforge.data.prepare.split import SplitRule
from gptforge.data.prepare.text_io import TextFormat
from gptforge.errors import RunError

ProgressCallback = Callable[[int, int], None]
"""Hears how many more bytes of the files are done, and how many bytes of text."""
POLL_SECONDS = 0.2
"""Seconds between looks at how far the others are."""


class StopRequested(Exception):  # noqa: N818 (it is a wish, not an error)
    """Somebody asked the work to stop."""


def run_in_process(
    jobs: Sequence[Job],
    out_dir: Path,
    tokenizer: Path,
    *,
    split_rule: SplitRule,
    text_format: TextFormat,
    skip_bad: bool,
    progress: ProgressCallback,
) -> Iterator[tuple[Job, JobResult]]:
    """Jobs and what they made, in this process."""
    known = tokenizers.load(tokenizer)
    worker = JobRunner(
        out_dir, known, split_rule, text_format, skip_bad=skip_bad, progress=progress
    )
    for job in jobs:
        yield job, worker.run(job)


def run_in_workers(
    jobs: Sequence[Job],
    out_dir: Path,
    tokenizer: Path,
    *,
    split_rule: SplitRule,
    text_format: TextFormat,
    skip_bad: bool,
    progress: ProgressCallback,
    num_workers: int,
) -> Iterator[tuple[Job, JobResult]]:
    """Jobs and what they made, by several processes, as they are finished.

    Raises:
        UserError: what a job found wrong; the others stop.
        RunError: if a process was ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    counts = context.Value("q", 0), context.Value("q", 0)
    # No lock: one who was ended while holding it would never give it back.
    stop = context.RawValue("b", 0)
    crew = ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_begin,
        initargs=(out_dir, tokenizer, split_rule, text_format, skip_bad, counts, stop),
    )
    try:
        waiting: dict[Future[JobResult], Job] = {crew.submit(_do, job): job for job in jobs}
        told = [0, 0]
        while waiting:
            done, _ = wait(waiting, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            now = [count.value for count in counts]
            progress(now[0] - told[0], now[1] - told[1])
            told = now
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise RunError(
            "a process of the preparation was ended from outside, perhaps for want of memory: "
            "the same command goes on, with fewer at a time by --workers"
        ) from None
    finally:
        stop.value = 1
        crew.shutdown(wait=True, cancel_futures=True)


_worker: JobRunner


def _begin(
    folder: Path,
    tokenizer: Path,
    split: SplitRule,
    text_format: TextFormat,
    skip_bad: bool,
    counts: tuple[Any, Any],
    stop: Any,
) -> None:
    """Make a process ready for jobs."""
    # Ctrl-C reaches every process of the terminal; the first one tells the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def told(read: int, text: int) -> None:
        if stop.value:
            raise StopRequested
        for count, more in zip(counts, (read, text), strict=True):
            with count.get_lock():
                count.value += more

    global _worker
    _worker = JobRunner(
        folder, tokenizers.load(tokenizer), split, text_format, skip_bad=skip_bad, progress=told
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Job) -> JobResult:
    return _worker.run(job)


def num_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
