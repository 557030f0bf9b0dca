"""Run the jobs of a preparation in worker processes, but for those that have run before."""

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from gptforge import files
from gptforge.data.prepare.job import Job, JobResult, JobRunner, Progress
from gptforge.data.prepare.request import ProgressBar
from gptforge.data.token_dataset import read_shard_header
from gptforge.errors import RunError

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
MIN_PARALLEL_BYTES = 2**24  # less is encoded before worker processes would have started


class StopRequested(Exception):  # noqa: N818 (not an error: the parent process stops the work)
    """The parent process asked the workers to stop."""


def run_jobs(
    jobs: Sequence[Job],
    runner: JobRunner,
    progress_dir: Path,
    num_workers: int,
    progress: ProgressBar | None,
) -> list[JobResult]:
    """Run the jobs that have no result in a folder yet; returns the results of all, in order.

    Raises:
        UserError: the error of a job; the others stop.
        RunError: if a worker process was killed.
    """
    paths = {job: progress_dir / f"job-{job.index:06d}.json" for job in jobs}
    loaded = {job: _load_result(path, runner.out_dir) for job, path in paths.items()}
    results = {job: result for job, result in loaded.items() if result is not None}
    if results:
        logger.info(f"resuming: {len(results)} of {len(jobs)} parts are finished")
    num_bytes, done = (sum(s.num_bytes for j in js for s in j.spans) for js in (jobs, results))
    if progress:
        progress.start(num_bytes, done)
    if num_bytes - done < MIN_PARALLEL_BYTES and not num_workers:
        num_workers = 1
    remaining = [job for job in jobs if job not in results]
    num_workers = min(len(remaining), num_workers or num_cpus())
    add = progress.add if progress else lambda file_bytes, text_bytes: None
    for job, result in _run(remaining, runner, add, num_workers):
        files.atomic_write(paths[job], json.dumps(result.to_json(), ensure_ascii=False))
        results[job] = result
    return [results[job] for job in jobs]


def _load_result(path: Path, out_dir: Path) -> JobResult | None:
    """Return the result of a finished job if its shards are intact."""
    try:
        result = JobResult.from_json(json.loads(files.read_text(path, follow_symlinks=False)))
        for shard in result.shards:
            shard_path = out_dir / shard["file"]
            num_tokens = read_shard_header(shard_path).num_tokens
            if shard_path.parent != out_dir or num_tokens != shard["tokens"]:
                return None
            if files.sha256(shard_path) != shard["sha256"]:
                return None
        return result
    except Exception:
        # Missing, corrupt, or from another version: run the job again.
        return None


def _run(
    jobs: Sequence[Job], runner: JobRunner, progress: Progress, num_workers: int
) -> Iterator[tuple[Job, JobResult]]:
    """Yield each job with its result as it finishes; one worker is this process."""
    if num_workers <= 1:
        for job in jobs:
            yield job, runner.run(job, progress)
        return
    context = multiprocessing.get_context("spawn")
    counts = context.Value("q", 0), context.Value("q", 0)
    # No lock: a worker that is killed while holding it would never release it.
    stop = context.RawValue("b", 0)
    pool = ProcessPoolExecutor(num_workers, context, _init_worker, (runner, counts, stop))
    try:
        with _sigint_blocked():
            running = {pool.submit(_run_job, job): job for job in jobs}
        reported = [0, 0]
        while running:
            finished, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            totals = [count.value for count in counts]
            progress(totals[0] - reported[0], totals[1] - reported[1])
            reported = totals
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        hint = "the same command resumes, with fewer processes if you lower --workers"
        problem = "a worker process was killed, perhaps because memory ran out"
        raise RunError(f"{problem}: {hint}") from None
    finally:
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delay Ctrl-C; processes that start meanwhile never get it, not even in their imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def num_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_run_here: Callable[[Job], JobResult]


def _init_worker(runner: JobRunner, counts: tuple[Any, Any], stop: Any) -> None:
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def progress(file_bytes: int, text_bytes: int) -> None:
        if stop.value:
            raise StopRequested
        for count, more in zip(counts, (file_bytes, text_bytes), strict=True):
            with count.get_lock():
                count.value += more

    global _run_here
    _run_here = functools.partial(runner.run, progress=progress)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_job(job: Job) -> JobResult:
    return _run_here(job)
