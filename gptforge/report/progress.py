"""Progress of work before and after training: a bar with the time left, if stderr is a terminal."""

import time
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.progress import TextColumn, TimeRemainingColumn

from gptforge.report.console import BarOrLines

T = TypeVar("T")


class ProgressMeter(BarOrLines):
    """A bar with the time left, on stderr; nothing in a pipe. One at a time.

    Args:
        description: what is being done, such as "exporting".
    """

    def __init__(self, description: str) -> None:
        columns = (
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[dim]{task.fields[status]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        super().__init__(description, *columns, stream="stderr")
        if self._bar is not None:
            self._task = self._bar.add_task(description, total=None, status="")
        self._begin = time.perf_counter()
        self.total = self._done = self._text_bytes = 0

    def __call__(self, done: int, total: int, status: str = "") -> None:
        """Show how much is done, with `status` next to it."""
        self.total, self._done = total, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, status=status)

    def start(self, total: int, done: int = 0) -> None:
        """Start to count the bytes of files; an earlier, interrupted call has read `done`."""
        self._begin, self._text_bytes = time.perf_counter(), 0
        self(done, total)

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Count bytes read from the files, and bytes of text found in them."""
        self._text_bytes += text_bytes
        speed = self._text_bytes / 1e6 / max(1e-9, time.perf_counter() - self._begin)
        self(self._done + file_bytes, self.total, f"{speed:.1f} MB/s")


def track(items: Collection[T], description: str) -> Iterator[T]:
    """Yield the items, with a `ProgressMeter` that counts them."""
    with ProgressMeter(description) as meter:
        for i, item in enumerate(items):
            meter(i, len(items))
            yield item
