"""What people watch: plain lines, and a progress bar that exists only on a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

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


class Console(Protocol):
    """Somewhere to say lines and show progress; a context, so that a bar is always cleared."""

    def log(self, text: str) -> None:
        """Print a line, or several."""
        ...

    def update(self, step: int, status: str) -> None:
        """So many steps are done; `note` stands beside the bar."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class PlainConsole:
    """For pipes and files: the lines, and nothing else."""

    def log(self, text: str) -> None:
        """Print at once: somebody may be following the pipe.

        A reader that has gone, such as `head`, or a full disk behind the pipe must not end a
        training: it goes on in its files.
        """
        with _going_on_unseen():
            safe_print(text)

    def update(self, step: int, status: str) -> None:
        """A pipe has no bar."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class TerminalConsole:
    """Lines above a bar with the time left."""

    def __init__(self, total: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            transient=True,
            refresh_per_second=4,
            console=rich.console.Console(file=sys.stdout),
        )
        self._task = self._progress.add_task("training", total=total, completed=done, note="")

    def log(self, text: str) -> None:
        """Print as it is: no colours, no wrapping, so that lines can be copied."""
        with _going_on_unseen():
            self._progress.console.print(
                printable_text(text), markup=False, highlight=False, emoji=False, soft_wrap=True
            )

    def update(self, step: int, status: str) -> None:
        """Move the bar."""
        with _going_on_unseen():
            self._progress.update(self._task, completed=step, note=status)

    def __enter__(self) -> Self:
        with _going_on_unseen():
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with _going_on_unseen():
            self._progress.stop()


@contextmanager
def _going_on_unseen() -> Iterator[None]:
    """Where nobody takes what is written any more, the rest of it goes nowhere."""
    try:
        yield
    except OSError:
        files.redirect_to_devnull(sys.stdout)


def open_console(*, total: int, done: int) -> Console:
    """The console that fits standard output."""
    return TerminalConsole(total, done) if sys.stdout.isatty() else PlainConsole()


class NullConsole(PlainConsole):
    """A console that nobody looks at."""

    def log(self, text: str) -> None:
        """Rank 0 says it."""
