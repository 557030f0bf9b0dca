"""Run the jobs of a preparation in worker processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from gptforge.data.prepare.job import (
    Job,
    JobResult,
    JobRunner,
    JobSettings,
)
from gptforge.errors import RunError

POLL_SECONDS = 0.2


class StopRequested(Exception):  # noqa: N818 (not an error: the parent process stops the work)
    """The parent process asked the workers to stop."""


def run_jobs(
    jobs: Sequence[Job],
    settings: JobSettings,
    *,
    progress: Callable[[int, int], None],
    num_workers: int,
) -> Iterator[tuple[Job, JobResult]]:
    """Run jobs and yield each with its result as it finishes; one worker is this process.

    Raises:
        UserError: the error of a job; the others stop.
        RunError: if a worker process was killed.
    """
    if num_workers <= 1:
        runner = JobRunner(settings, progress)
        for job in jobs:
            yield job, runner.run(job)
        return
    context = multiprocessing.get_context("spawn")
    counts = context.Value("q", 0), context.Value("q", 0)
    # No lock: a worker that is killed while holding it would never release it.
    stop = context.RawValue("b", 0)
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_init_worker,
        initargs=(settings, counts, stop),
    )
    try:
        running: dict[Future[JobResult], Job] = {pool.submit(_run_job, job): job for job in jobs}
        reported = [0, 0]
        while running:
            finished, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            totals = [count.value for count in counts]
            progress(totals[0] - reported[0], totals[1] - reported[1])
            reported = totals
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, perhaps because memory ran out: the same command "
            "resumes, with fewer processes if you lower --workers"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_runner: JobRunner


def _init_worker(settings: JobSettings, counts: tuple[Any, Any], stop: Any) -> None:
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def progress(file_bytes: int, text_bytes: int) -> None:
        if stop.value:
            raise StopRequested
        for count, more in zip(counts, (file_bytes, text_bytes), strict=True):
            with count.get_lock():
                count.value += more

    global _runner
    _runner = JobRunner(settings, progress)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_job(job: Job) -> JobResult:
    return _runner.run(job)
