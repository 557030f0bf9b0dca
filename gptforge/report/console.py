"""Log lines on stdout, with a progress bar if stdout is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gptforge import files
from gptforge.printable import printable_text, safe_print


class Console:
    """Prints lines to stdout; on a terminal, above a progress bar with the time left.

    A closed pipe or a full disk behind stdout does not stop training: later output is discarded.

    Args:
        total: steps of the whole run; 0 for no progress bar.
        step: steps done so far.
        enabled: False on all ranks but 0, which print nothing.
    """

    def __init__(self, total: int = 0, step: int = 0, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and total and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("[dim]left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                transient=True,
                refresh_per_second=4,
                console=rich.console.Console(file=sys.stdout),
            )
            self._task = self._bar.add_task("training", total=total, completed=step, status="")

    def log(self, text: str) -> None:
        """Print one or more lines and flush."""
        with _ignore_broken_stdout():
            if self._bar is not None:
                print_above(self._bar, text)
            elif self._enabled:
                safe_print(text)

    def update(self, step: int, status: str) -> None:
        """Advance the progress bar to `step`; `status` is shown next to it."""
        if self._bar is not None:
            with _ignore_broken_stdout():
                self._bar.update(self._task, completed=step, status=status)

    def __enter__(self) -> Self:
        if self._bar is not None:
            with _ignore_broken_stdout():
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with _ignore_broken_stdout():
                self._bar.stop()


def print_above(bar: Progress, text: str) -> None:
    """Print above a progress bar without colors or wrapping, so that lines can be copied."""
    bar.console.print(
        printable_text(text), markup=False, highlight=False, emoji=False, soft_wrap=True
    )


@contextmanager
def _ignore_broken_stdout() -> Iterator[None]:
    """Redirect stdout to the null device after the first write error."""
    try:
        yield
    except OSError:
        files.redirect_to_devnull(sys.stdout)
