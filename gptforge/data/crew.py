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
from gptforge.data.documents import Form
from gptforge.data.job import Done, Job, Worker
from gptforge.data.split import Split
from gptforge.errors import RunError

Told = Callable[[int, int], None]
"""Hears how many more bytes of the files are done, and how many bytes of text."""
GLANCE = 0.2
"""Seconds between looks at how far the others are."""


class Stopped(Exception):  # noqa: N818 (it is a wish, not an error)
    """Somebody asked the work to stop."""


def do_here(
    jobs: Sequence[Job],
    folder: Path,
    tokenizer: Path,
    *,
    split: Split,
    form: Form,
    skip_bad: bool,
    progress: Told,
) -> Iterator[tuple[Job, Done]]:
    """Jobs and what they made, in this process."""
    known = tokenizers.load(tokenizer)
    worker = Worker(folder, known, split, form, skip_bad=skip_bad, progress=progress)
    for job in jobs:
        yield job, worker.run(job)


def do_together(
    jobs: Sequence[Job],
    folder: Path,
    tokenizer: Path,
    *,
    split: Split,
    form: Form,
    skip_bad: bool,
    progress: Told,
    workers: int,
) -> Iterator[tuple[Job, Done]]:
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
        workers,
        mp_context=context,
        initializer=_begin,
        initargs=(folder, tokenizer, split, form, skip_bad, counts, stop),
    )
    try:
        waiting: dict[Future[Done], Job] = {crew.submit(_do, job): job for job in jobs}
        told = [0, 0]
        while waiting:
            done, _ = wait(waiting, timeout=GLANCE, return_when=FIRST_COMPLETED)
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


_worker: Worker


def _begin(
    folder: Path,
    tokenizer: Path,
    split: Split,
    form: Form,
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
            raise Stopped
        for count, more in zip(counts, (read, text), strict=True):
            with count.get_lock():
                count.value += more

    global _worker
    _worker = Worker(
        folder, tokenizers.load(tokenizer), split, form, skip_bad=skip_bad, progress=told
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(job: Job) -> Done:
    return _worker.run(job)
