"""Progress of work before and after training: a bar or lines on stderr, with the time left."""

import time

from rich.progress import TextColumn, TimeRemainingColumn

from gptforge.printable import print_stderr
from gptforge.report.console import BarOrLines
from gptforge.report.format import format_duration
from gptforge.report.log_handler import shows_progress

PRINT_EVERY = 10.0
"""Seconds between lines if stderr is not a terminal."""
MIN_CALLS = 3
"""Calls before `EtaNotice` estimates: the first ones include warmup."""
MIN_SECONDS = 5.0
"""`EtaNotice` is silent if less time is left."""


class ProgressMeter(BarOrLines):
    """Shows how much of the input files has been read: a bar on a terminal, else lines."""

    def __init__(self, description: str) -> None:
        columns = (
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[dim]{task.fields[speed]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        super().__init__(description, *columns, stream="stderr")
        if self._bar is not None:
            self._task = self._bar.add_task(description, total=None, speed="")
        self._description = description
        self._last_print = self._begin = time.perf_counter()
        self.total = self._read = self._resumed_from = self._text_bytes = 0

    def start(self, total: int, done: int) -> None:
        """Start the clock; an earlier, interrupted call has read `done` of the `total` bytes."""
        self.total, self._read, self._resumed_from, self._text_bytes = total, done, done, 0
        self._begin = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done)

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Count bytes read from the files, and bytes of text found in them."""
        self._read += file_bytes
        self._text_bytes += text_bytes
        now = time.perf_counter()
        seconds = max(1e-9, now - self._begin)
        speed = f"{self._text_bytes / 1e6 / seconds:.1f} MB/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._read, speed=speed)
        elif now - self._last_print >= PRINT_EVERY and self._read > self._resumed_from:
            self._last_print = now
            left = seconds / (self._read - self._resumed_from) * (self.total - self._read)
            share = self._read / max(1, self.total)
            line = f"{self._description}: {share:.0%}, {speed}, about {format_duration(left)} left"
            if shows_progress():
                self.log(line)


class EtaNotice:
    """Prints the time left once, on stderr, if a task turns out to take long."""

    def __init__(self, description: str) -> None:
        self._description, self._begin = description, time.perf_counter()
        self._calls, self._printed = 0, False

    def __call__(self, done: int, total: int) -> None:
        """Call after each part of the task, with the amount done so far."""
        self._calls += 1
        seconds = (time.perf_counter() - self._begin) / done * (total - done)
        if self._calls >= MIN_CALLS and seconds > MIN_SECONDS and not self._printed:
            self._printed = True
            print_stderr(f"{self._description} takes about {format_duration(seconds)} more")
