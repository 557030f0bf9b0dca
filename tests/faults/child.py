"""Runs the program and injects a fault before its n-th change of the disk.

Every change counts: opening a file for writing, rename, mkdir, link, deletion and fsync, so that
over many rounds faults hit between any two of them. They are seen through Python's audit events
instead of wrapped functions, so that no change, now or later, can be missed.
"""

import builtins
import errno
import io
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gptforge.cli
import gptforge.report.run_report
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.training import signals
from tests.pictures import use_blank_pictures, use_short_samples

OPERATIONS = "operations.txt"
OUT, ERR = "out.txt", "err.txt"
BALLAST = "ballast"
HOURS = 5 * 3600.0
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Injection:
    """A fault at the `at`-th change of the disk, or at a batch of an evaluation.

    Actions: kill; tear (kill in the middle of a write); SIGTERM or SIGINT; fill (the disk);
    readonly (the mount); refuse (all changes from now on, with the errno `detail`); clock (jumps
    back); stall (the clock stops); limit (sets the minimum seconds of a session to `detail`).
    """

    at: int
    action: str
    detail: str = ""
    in_evaluation: bool = False


def run(folder: str, args: Sequence[str], injections: Sequence[Injection]) -> None:
    """Run the program in `folder` with output in out.txt and err.txt, and exit with its code."""
    # Until the program has its own handlers, and after it, Ctrl-C ends the process at once: the
    # traceback of a KeyboardInterrupt here would be none of the program's.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(folder)
    for number, name in ((1, OUT), (2, ERR)):
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
        os.close(fd)
    torch.set_num_threads(1)
    # The files are written as always; drawing full curves would be half of the time of a round.
    use_blank_pictures()
    use_short_samples()
    # They are written at the end only: every some seconds, a slow run would change the disk more
    # often than a fast one.
    gptforge.report.run_report.PLOT_EVERY_SECONDS = math.inf
    faults = FaultInjector(Path(folder), injections)
    faults.install()
    try:
        sys.argv[1:] = args
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = gptforge.cli.main()
    finally:
        faults.is_over = True
    # As in the program, threads complete their writes before the process exits.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    Path(OPERATIONS).write_text(str(faults.count), encoding="utf-8")
    sys.exit(code)


class FaultInjector:
    """Counts changes of the disk below `folder` and injects faults."""

    def __init__(self, folder: Path, injections: Sequence[Injection]) -> None:
        self.folder = folder.resolve()
        self.injections = list(injections)
        self.count = 0
        self.is_over = False
        self._is_torn = False
        self._refused = 0
        self._counting = threading.Lock()  # training and saving run in parallel
        self._busy = threading.local()

    def install(self) -> None:
        """Install the hooks, which cannot be removed again."""
        real_fsync, real_open = os.fsync, io.open

        def fsync(fd: Any) -> None:
            self.change()
            real_fsync(fd)

        def opened(*args: Any, **kwargs: Any) -> Any:
            file = real_open(*args, **kwargs)
            if self._is_torn and file.writable() and self._is_inside(args[0]):
                _tear(file)
            return file

        for injection in self.injections:
            if injection.action == "limit":
                signals.MIN_TRAIN_SECONDS = float(injection.detail)
        in_evaluation = [injection for injection in self.injections if injection.in_evaluation]
        self.injections = [
            i for i in self.injections if not i.in_evaluation and i.action != "limit"
        ]
        if in_evaluation:
            _count_batches(in_evaluation)
        os.fsync = fsync  # type: ignore[assignment]
        io.open = builtins.open = opened
        sys.addaudithook(self._on_event)

    def change(self) -> None:
        """Called before each change of the disk."""
        if self.is_over or getattr(self._busy, "now", False):
            return
        with self._counting:
            self.count += 1
            due = [injection for injection in self.injections if injection.at <= self.count]
            self.injections = [injection for injection in self.injections if injection not in due]
        self._busy.now = True  # changes by an injection do not count
        try:
            for injection in due:
                if not self._inject(injection):
                    self.injections.append(injection)
        finally:
            self._busy.now = False
        if self._refused:
            raise OSError(self._refused, os.strerror(self._refused))

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITING and self._is_inside(path):
                self.change()
        elif event in CHANGES and self._is_inside(args[0]):
            self.change()

    def _is_inside(self, path: object) -> bool:
        # Names relative to an open folder, as rmtree uses them, count as inside. A change of a
        # link is a change of the link, not of its target.
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path.cwd().joinpath(os.fsdecode(path)).is_relative_to(self.folder)

    def _inject(self, injection: Injection) -> bool:
        """Inject a fault; False if that is impossible at this moment."""
        match injection.action:
            case "kill":
                end_now()
            case "tear":
                self._is_torn = True
            case "SIGTERM" | "SIGINT":
                os.kill(os.getpid(), signal.Signals[injection.action])
            case "fill":
                fill(Path(injection.detail))
            case "readonly":
                # Refused while another thread has a file open for writing.
                return remount(injection.detail, "ro")
            case "refuse":
                self._refused = int(getattr(errno, injection.detail))
            case "clock" | "stall":
                distort_clocks(injection.action)
        return True


def _count_batches(injections: Sequence[Injection]) -> None:
    """Send a signal, or kill, during the n-th batch of evaluations."""
    real_batch, count = ValEvaluator._batch, [0]

    def batch(evaluator: ValEvaluator, sequences: Any) -> Any:
        count[0] += 1
        for injection in injections:
            if injection.at == count[0]:
                if injection.action == "kill":
                    end_now()
                os.kill(os.getpid(), signal.Signals[injection.action])
        return real_batch(evaluator, sequences)

    ValEvaluator._batch = batch  # type: ignore[method-assign]


def end_now() -> None:
    """End this process without cleanup; Windows has only one such signal."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def fill(folder: Path) -> None:
    """Fill the disk to the last byte."""
    fd = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT)
    size = 2**20
    while size:
        try:
            os.write(fd, b"\0" * size)
        except OSError:
            size //= 2
    os.close(fd)


def remount(mount: str, options: str) -> bool:
    """Change the options of a mount; whether that succeeded."""
    command = ["mount", "-o", f"remount,{options}", mount]
    return subprocess.run(command, capture_output=True).returncode == 0


def distort_clocks(how: str) -> None:
    """Set all clocks back by hours, or stop them."""
    for name in ("time", "monotonic", "perf_counter"):
        real = getattr(time, name)
        now = real()
        distorted = (lambda now=now: now) if how == "stall" else (lambda real=real: real() - HOURS)
        setattr(time, name, distorted)


def _tear(file: Any) -> None:
    write = file.write

    def write_half(data: Any) -> None:
        write(data[: len(data) // 2])
        file.flush()
        end_now()

    file.write = write_half
