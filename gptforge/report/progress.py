"""How far a preparation is: megabytes a second and the time left."""

import sys
import time
from typing import Protocol, Self

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptforge.printable import print_stderr, printable_text
from gptforge.report.format import format_duration

PRINT_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class ProgressMeter(Protocol):
    """Hears how far the work is, and says lines; a context, so that a bar is always cleared."""

    total: int
    """Bytes there are to be done; 0 as long as no work has begun."""

    def start(self, total: int, done: int) -> None:
        """So many bytes there are, and so many were done before."""
        ...

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """So many more bytes of the files are done, and so many bytes of text."""
        ...

    def log(self, text: str) -> None:
        """Print a line."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class _Count:
    """Bytes and seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.start(0, 0)

    def start(self, total: int, done: int) -> None:
        self.total, self.read, self.begun_at, self.text = total, done, done, 0
        self.begin = time.perf_counter()

    def add(self, file_bytes: int, text_bytes: int) -> None:
        self.read += file_bytes
        self.text += text_bytes

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.begin)

    @property
    def speed(self) -> str:
        return f"{self.text / 1e6 / self.seconds:.1f} MB/s"


class PlainMeter(_Count):
    """For pipes and files: a line now and then."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._said = time.perf_counter()

    def log(self, text: str) -> None:
        """Print at once, beside the results."""
        print_stderr(text)

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Count; say so if that was not done for a while."""
        super().add(file_bytes, text_bytes)
        if time.perf_counter() - self._said < PRINT_EVERY or self.read <= self.begun_at:
            return
        self._said = time.perf_counter()
        left = self.seconds / (self.read - self.begun_at) * (self.total - self.read)
        share = self.read / max(1, self.total)
        self.log(f"{self.what}: {share:.0%}, {self.speed}, about {format_duration(left)} left")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class TerminalMeter(_Count):
    """A bar."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._progress = Progress(
            TextColumn(what),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[dim]{task.fields[speed]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            transient=True,
            refresh_per_second=4,
            console=rich.console.Console(file=sys.stderr),
        )
        self._task = self._progress.add_task(what, total=None, speed="")

    def start(self, total: int, done: int) -> None:
        """Know how long the bar is."""
        super().start(total, done)
        if hasattr(self, "_task"):
            self._progress.update(self._task, total=total, completed=done)

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Move the bar."""
        super().add(file_bytes, text_bytes)
        self._progress.update(self._task, completed=self.read, speed=self.speed)

    def log(self, text: str) -> None:
        """Print above the bar, as it is."""
        self._progress.console.print(
            printable_text(text), markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def open_meter(what: str) -> ProgressMeter:
    """The meter that fits standard error."""
    return TerminalMeter(what) if sys.stderr.isatty() else PlainMeter(what)


MIN_CALLS = 3
"""Parts behind which a guess is made: the first one pays for warming up."""
MIN_SECONDS = 5.0
"""Seconds from which on it is said."""


class EtaNotice:
    """Called behind each part of a work; tells on standard error.

    Args:
        what: takes so long.
    """

    def __init__(self, what: str) -> None:
        self._what, self._begun = what, time.perf_counter()
        self._parts, self._is_told = 0, False

    def __call__(self, done: int, total: int) -> None:
        """So much is done, of so much."""
        self._parts += 1
        seconds = (time.perf_counter() - self._begun) / done * (total - done)
        if self._parts >= MIN_CALLS and seconds > MIN_SECONDS and not self._is_told:
            self._is_told = True
            print_stderr(f"{self._what} takes about {format_duration(seconds)} more")
