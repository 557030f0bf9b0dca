"""A file that grows line by line, and whose lines a full disk does not lose."""

from collections.abc import Callable
from pathlib import Path
from typing import IO

from gptforge.files import open_regular

BLOCK_BYTES = 2**16
"""Bytes that are looked at together for the end of a line."""


class BufferedLog:
    """Lines that are written at once, or as soon as the disk takes them.

    No line is worth a training: one that is refused waits in memory, in front of those that come
    after it. So the file never has a gap, and what it will hold has a length at any time.

    Args:
        path: the file.
        refused: told each time that it cannot be written.
    """

    def __init__(self, path: Path, on_error: Callable[[Path, OSError], None]) -> None:
        self.path = path
        self._refused = on_error
        self._waiting = b""
        self._whole: int | None = None
        """Bytes that are good, where an attempt failed and may have left half a line."""

    @property
    def pending(self) -> str:
        """What the disk has not taken yet."""
        return self._waiting.decode()

    @property
    def size(self) -> int:
        """Bytes of the file, those that wait included."""
        return self._written() + len(self._waiting)

    def write(self, text: str) -> None:
        """Put text behind what is there."""
        self._waiting += text.encode()
        try:
            self._write()
        except OSError as error:
            self._refused(self.path, error)

    def truncate(self, size: int) -> None:
        """Keep the lines that end within the first `size` bytes."""
        written = self._written()
        self._waiting = self._waiting[: max(0, size - written)]
        if not self.path.is_file():
            return
        with open_regular(self.path, "rb+", follow_symlinks=False) as file:
            kept = min(size, written)
            # A crash may have left half a line; what comes next would be glued to it.
            file.truncate(kept if self._waiting else _end_of_lines(file, kept))
        self._whole = None

    def delete(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        self._waiting, self._whole = b"", None

    def _written(self) -> int:
        if self._whole is not None:
            return self._whole
        return self.path.stat().st_size if self.path.is_file() else 0

    def _write(self) -> None:
        # Unbuffered: a buffer that the disk refused would be tried again when the file is closed.
        with open_regular(self.path, "ab", follow_symlinks=False, buffering=0) as file:
            end = file.seek(0, 2)
            if self._whole is not None and self._whole < end:
                file.truncate(self._whole)
            elif self._whole is None:
                self._whole = end
            left = self._waiting
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(self._whole)
                raise
        self._waiting, self._whole = b"", None


def _end_of_lines(file: IO[bytes], size: int) -> int:
    """Where the last whole line within the first `size` bytes ends."""
    end = size
    while end > 0:
        begin = max(0, end - BLOCK_BYTES)
        file.seek(begin)
        place = file.read(end - begin).rfind(b"\n")
        if place >= 0:
            return begin + place + 1
        end = begin
    return 0
