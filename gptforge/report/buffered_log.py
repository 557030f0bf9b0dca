"""An append-only text file that loses no line when the disk is full."""

from collections.abc import Callable
from pathlib import Path

from gptforge.files import open_regular


class BufferedLog:
    """Appends text at once, or as soon as the disk accepts it.

    A failed write must not stop training: the text stays in memory, ahead of what is written later.
    So the file never has a gap, and its final length is known at any time.

    Args:
        path: the file.
        on_error: called with the path and the error after each failed write.
    """

    def __init__(self, path: Path, on_error: Callable[[Path, OSError], None]) -> None:
        self.path = path
        self._on_error = on_error
        self._pending = b""
        self._valid_size: int | None = None
        """Size before a failed write, which may have left part of a line behind; else None."""

    @property
    def pending(self) -> str:
        """Text that is not on disk yet."""
        return self._pending.decode()

    @property
    def size(self) -> int:
        """Bytes of the file once all pending text is written."""
        return self._written() + len(self._pending)

    def write(self, text: str) -> None:
        """Append text."""
        self._pending += text.encode()
        try:
            self._flush()
        except OSError as error:
            self._on_error(self.path, error)

    def truncate(self, size: int) -> None:
        """Keep only the lines that end within the first `size` bytes."""
        written = self._written()
        self._pending = self._pending[: max(0, size - written)]
        if not self.path.is_file():
            return
        with open_regular(self.path, "rb+", follow_symlinks=False) as file:
            size = min(size, written)
            # A crash may have left part of a line, which the next write would be appended to.
            file.truncate(size if self._pending else file.read(size).rfind(b"\n") + 1)
        self._valid_size = None

    def delete(self) -> None:
        """Delete the file and drop pending text."""
        self.path.unlink(missing_ok=True)
        self._pending, self._valid_size = b"", None

    def _written(self) -> int:
        if self._valid_size is not None:
            return self._valid_size
        return self.path.stat().st_size if self.path.is_file() else 0

    def _flush(self) -> None:
        # Unbuffered: Python would retry a failed buffered write when it closes the file.
        with open_regular(self.path, "ab", follow_symlinks=False, buffering=0) as file:
            if self._valid_size is None:
                self._valid_size = file.seek(0, 2)
            else:
                file.truncate(min(self._valid_size, file.seek(0, 2)))
            left = self._pending
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(self._valid_size)
                raise
        self._pending, self._valid_size = b"", None
