"""The program in a process of its own, with a fault that strikes at its n-th change of the disk.

Used by harness.py alone. Every change is counted: a file opened for writing, a rename, a new
folder, a link, a deletion, an fsync. The fault strikes just before the n-th, so over many rounds it
strikes between any two of them. Changes are seen through Python's audit events, not by wrapping the
program's own functions: nothing in the program has to know, and nothing new in it can be missed.
"""

import builtins
import errno
import io
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

# Imported before the fork, so that a round does not pay for them again.
import torch
import torch._dynamo

import gptforge.builders
import gptforge.cli
from gptforge.evaluate.val_loss import ValEvaluator
from gptforge.train import signals

OPERATIONS = "operations.txt"
OUT, ERR = "out.txt", "err.txt"
BALLAST = "ballast"
HOURS = 5 * 3600.0
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Strike:
    """One thing that goes wrong.

    Actions: kill; tear (kill, with half of a write made); SIGTERM or SIGINT; fill (the disk, to the
    last byte); readonly (the mount); refuse (with ENOSPC or another error, from here on); clock
    (jumps back); stall (the clock stands still). Where `in_evaluation`, `at` counts the batches of
    all evaluations; `limit` sets the seconds that a session trains at least.
    """

    at: int
    action: str
    detail: str = ""
    in_evaluation: bool = False


def run(folder: str, args: Sequence[str], strikes: Sequence[Strike]) -> None:
    """Run the program in `folder`, its words in out.txt and err.txt; leaves with its exit code."""
    os.chdir(folder)
    for number, name in ((1, OUT), (2, ERR)):
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    torch.set_num_threads(1)
    faults = Faults(Path(folder), strikes)
    faults.install()
    try:
        code = gptforge.cli.main(list(args))
    finally:
        faults.is_over = True
    # What a thread still writes is written before the process goes, as in the program itself.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    Path(OPERATIONS).write_text(str(faults.count), encoding="utf-8")
    sys.exit(code)


class Faults:
    """Counts changes of the disk below `folder`, and strikes."""

    def __init__(self, folder: Path, strikes: Sequence[Strike]) -> None:
        self.folder = folder.resolve()
        self.strikes = list(strikes)
        self.count = 0
        self.is_over = False
        self._is_torn = False
        self._refused = 0
        self._counting = threading.Lock()  # training and saving go on side by side
        self._busy = threading.local()

    def install(self) -> None:
        """Begin to listen; for good, so only in a process that is made for it."""
        real_fsync, real_open = os.fsync, io.open

        def fsync(handle: Any) -> None:
            self.change()
            real_fsync(handle)

        def opened(*args: Any, **kwargs: Any) -> Any:
            file = real_open(*args, **kwargs)
            if self._is_torn and file.writable() and self._is_inside(args[0]):
                _tear(file)
            return file

        for strike in self.strikes:
            if strike.action == "limit":
                signals.MIN_TRAIN_SECONDS = float(strike.detail)
        in_evaluation = [strike for strike in self.strikes if strike.in_evaluation]
        self.strikes = [s for s in self.strikes if not s.in_evaluation and s.action != "limit"]
        if in_evaluation:
            _count_batches(in_evaluation)
        os.fsync = fsync  # type: ignore[assignment]
        io.open = builtins.open = opened
        sys.addaudithook(self._heard)

    def change(self) -> None:
        """The disk is about to be changed."""
        if self.is_over or getattr(self._busy, "now", False):
            return
        with self._counting:
            self.count += 1
            due = [strike for strike in self.strikes if strike.at <= self.count]
            self.strikes = [strike for strike in self.strikes if strike not in due]
        self._busy.now = True  # what a strike itself does to the disk does not count
        try:
            for strike in due:
                if not self._strike(strike):
                    self.strikes.append(strike)
        finally:
            self._busy.now = False
        if self._refused:
            raise OSError(self._refused, os.strerror(self._refused))

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITING and self._is_inside(path):
                self.change()
        elif event in CHANGES and self._is_inside(args[0]):
            self.change()

    def _is_inside(self, path: object) -> bool:
        # Names relative to an open folder, as rmtree uses them, count as inside. Links are not
        # followed: a link is the thing that is changed.
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path.cwd().joinpath(os.fsdecode(path)).is_relative_to(self.folder)

    def _strike(self, strike: Strike) -> bool:
        """Do it; False if it could not be done at this moment."""
        match strike.action:
            case "kill":
                end_now()
            case "tear":
                self._is_torn = True
            case "SIGTERM" | "SIGINT":
                os.kill(os.getpid(), signal.Signals[strike.action])
            case "fill":
                fill(Path(strike.detail))
            case "readonly":
                # Refused while another thread has a file open for writing.
                return remount(strike.detail, "ro")
            case "refuse":
                self._refused = int(getattr(errno, strike.detail))
            case "clock" | "stall":
                bend_clocks(strike.action)
        return True


def _count_batches(strikes: Sequence[Strike]) -> None:
    """Send a signal, or kill, while the n-th batch of held-out text is on its way."""
    real_batch, count = ValEvaluator._batch, [0]

    def batch(held_out: ValEvaluator, windows: Any) -> Any:
        count[0] += 1
        for strike in strikes:
            if strike.at == count[0]:
                if strike.action == "kill":
                    end_now()
                os.kill(os.getpid(), signal.Signals[strike.action])
        return real_batch(held_out, windows)

    ValEvaluator._batch = batch  # type: ignore[method-assign]


def end_now() -> None:
    """Die here, with no chance to do anything. Windows has only one such end."""
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def fill(folder: Path) -> None:
    """Leave no byte free."""
    handle = os.open(folder / BALLAST, os.O_WRONLY | os.O_CREAT)
    size = 2**20
    while size:
        try:
            os.write(handle, b"\0" * size)
        except OSError:
            size //= 2
    os.close(handle)


def remount(mount: str, options: str) -> bool:
    """Change a mount's options; whether the system agreed."""
    command = ["mount", "-o", f"remount,{options}", mount]
    return subprocess.run(command, capture_output=True).returncode == 0


def bend_clocks(how: str) -> None:
    """Set all clocks back by hours, or stop them."""
    for name in ("time", "monotonic", "perf_counter"):
        real = getattr(time, name)
        now = real()
        bent = (lambda now=now: now) if how == "stall" else (lambda real=real: real() - HOURS)
        setattr(time, name, bent)


def _tear(file: Any) -> None:
    write = file.write

    def half(data: Any) -> None:
        write(data[: len(data) // 2])
        file.flush()
        end_now()

    file.write = half
