"""Log lines on stdout and progress bars, where these are terminals."""

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, TextIO, TypeVar

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gptforge import files
from gptforge.printable import encodable, is_terminal, printable_text, safe_print
from gptforge.report.log_handler import shows_progress

T = TypeVar("T")


class BarOrLines:
    """Prints lines to a stream; on a terminal, above a progress bar.

    After an error, as of a closed pipe or a full disk, later output is discarded.
    """

    def __init__(
        self,
        description: str,
        *columns: ProgressColumn,
        stream: Literal["stdout", "stderr"],
        total: int | None = None,
        completed: int = 0,
    ) -> None:
        self._stream = stream
        self._bar: Progress | None = None
        if columns and is_terminal(self._file) and shows_progress():
            self._bar = Progress(
                TextColumn(description), BarColumn(bar_width=30), *columns, transient=True,
                refresh_per_second=4, console=rich.console.Console(file=self._file),
                redirect_stdout=is_terminal(sys.stdout),  # what goes to a file stays there
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, completed=completed, status="")

    @property
    def _file(self) -> TextIO:
        # Looked up at each use: the file behind sys.stdout may be replaced.
        file: TextIO = getattr(sys, self._stream)
        return file

    def log(self, text: str) -> None:
        """Print one or more lines and flush."""
        with self._discard_after_error():
            if self._bar is None:
                safe_print(text, file=self._file)
            else:
                # Without colors or wrapping, so that lines can be copied.
                text = encodable(printable_text(text), self._file)
                self._bar.console.print(
                    text, markup=False, highlight=False, emoji=False, soft_wrap=True
                )

    def __enter__(self) -> Self:
        if self._bar is not None:
            with self._discard_after_error():
                self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with self._discard_after_error():
                self._bar.stop()

    def _update(self, **fields: Any) -> None:
        if self._bar is not None:
            with self._discard_after_error():
                self._bar.update(self._task, **fields)

    @contextmanager
    def _discard_after_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            files.redirect_to_devnull(self._file)


class Console(BarOrLines):
    """The output of a training run.

    Args:
        total: steps of the whole run; 0 for no progress bar.
        step: steps done so far.
    """

    def __init__(self, total: int = 0, step: int = 0) -> None:
        columns = (
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        shown = columns if total else ()
        super().__init__("training", *shown, stream="stdout", total=total, completed=step)

    def update(self, step: int, status: str) -> None:
        """Advance the progress bar to `step`; `status` is shown next to it."""
        self._update(completed=step, status=status)


class ProgressMeter(BarOrLines):
    """Progress of work before and after training: a bar on stderr; nothing in a pipe.

    One at a time; `description` is what is being done, such as "exporting".
    """

    def __init__(self, description: str) -> None:
        columns = (
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[dim]{task.fields[status]}"),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
        )
        super().__init__(description, *columns, stream="stderr")
        self._begin = time.perf_counter()
        self.total = self._done = self._text_bytes = 0

    def __call__(self, done: int, total: int, status: str = "") -> None:
        """Show how much is done, with `status` next to it."""
        self.total, self._done = total, done
        self._update(completed=done, total=total, status=status)

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
