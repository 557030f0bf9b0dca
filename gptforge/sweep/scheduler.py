"""Runs trials as child processes, several at once, and stops them so that they resume."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gptforge.printable import printable

POLL_SECONDS = 0.1


class Process(Protocol):
    """What the scheduler needs of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal."""

    def wait(self) -> int:
        """Wait for the end."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class Run:
    """One training run: a trial with one of its seeds.

    Attributes:
        trial: number of the trial.
        seed: of this run.
        folder: its run folder.
        args: arguments of `gptforge train`.
    """

    trial: int
    seed: int
    folder: Path
    args: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What the run prints, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")


def run_all(
    batches: Iterable[Sequence[Run]],
    *,
    jobs: int,
    start: Callable[[Run, int], Process],
    on_end: Callable[[Run, int], object],
) -> None:
    """Keep `jobs` runs going until there are none left.

    On Ctrl-C or SIGTERM, running ones get SIGTERM, save, and are waited for.

    Args:
        batches: runs; the next batch is taken only when a job is free.
        jobs: runs at a time.
        start: starts a run in a slot, 0 to jobs - 1.
        on_end: called with a run and its exit code.
    """
    waiting: deque[Run] = deque()
    source: Iterator[Sequence[Run]] = iter(batches)
    active: dict[int, tuple[Run, Process]] = {}
    try:
        while True:
            while len(active) < jobs:
                while not waiting and (batch := next(source, None)) is not None:
                    waiting.extend(batch)
                if not waiting:
                    break
                run = waiting.popleft()
                slot = min(set(range(jobs)) - active.keys())
                active[slot] = run, start(run, slot)
            if not active:
                return
            for slot, (run, process) in list(active.items()):
                code = process.poll()
                if code is not None:
                    del active[slot]
                    on_end(run, code)
            if len(active) == jobs or not waiting:
                time.sleep(POLL_SECONDS)
    except BaseException:
        _stop([process for _, process in active.values()])
        raise


def start_process(run: Run, command: Sequence[str], env: dict[str, str]) -> Process:
    """Start a run; its output replaces its log."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, *run.args],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            # Ctrl-C in a terminal then reaches the sweep alone, which stops its runs once.
            process_group=None if os.name == "nt" else 0,
        )


def last_error(run: Run, code: int) -> str:
    """The last error line that a run printed, or how it ended."""
    with contextlib.suppress(OSError):
        lines = run.log.read_text("utf-8", "replace").splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if last := (errors or [line for line in lines if line.strip()])[-1:]:
            return printable(last[0].strip())
    return f"exit code {code}"


def _stop(processes: Sequence[Process]) -> None:
    """Let children save and end; a second Ctrl-C ends them at once."""
    try:
        for process in processes:
            # Not SIGINT: a shell's background jobs ignore it. On Windows, Ctrl-C has reached them.
            if os.name != "nt" and process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.kill()
        raise
