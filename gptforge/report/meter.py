"""How far a preparation is: megabytes a second and the time left."""

import sys
import time
from typing import Protocol, Self

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gptforge.printable import print_note, printable_text
from gptforge.report.duration import in_words

EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class ShownMeter(Protocol):
    """Hears how far the work is, and says lines; a context, so that a bar is always cleared."""

    total: int
    """Bytes there are to be done; 0 as long as no work has begun."""

    def start(self, total: int, done: int) -> None:
        """So many bytes there are, and so many were done before."""
        ...

    def add(self, read: int, text: int) -> None:
        """So many more bytes of the files are done, and so many bytes of text."""
        ...

    def say(self, text: str) -> None:
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

    def add(self, read: int, text: int) -> None:
        self.read += read
        self.text += text

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

    def say(self, text: str) -> None:
        """Print at once, beside the results."""
        print_note(text)

    def add(self, read: int, text: int) -> None:
        """Count; say so if that was not done for a while."""
        super().add(read, text)
        if time.perf_counter() - self._said < EVERY or self.read <= self.begun_at:
            return
        self._said = time.perf_counter()
        left = self.seconds / (self.read - self.begun_at) * (self.total - self.read)
        share = self.read / max(1, self.total)
        self.say(f"{self.what}: {share:.0%}, {self.speed}, about {in_words(left)} left")

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

    def add(self, read: int, text: int) -> None:
        """Move the bar."""
        super().add(read, text)
        self._progress.update(self._task, completed=self.read, speed=self.speed)

    def say(self, text: str) -> None:
        """Print above the bar, as it is."""
        self._progress.console.print(
            printable_text(text), markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def open_meter(what: str) -> ShownMeter:
    """The meter that fits standard error."""
    return TerminalMeter(what) if sys.stderr.isatty() else PlainMeter(what)
