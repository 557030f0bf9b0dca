"""Reads mutated files in this process: each must work, or be refused in one line."""

import contextlib
import io
import random
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from gptforge.errors import RunError, UserError
from gptforge.printable import printable
from tests.fuzz.formats import FORMATS

TIMEOUT = 30  # seconds for one file


class FuzzFailure(AssertionError):  # noqa: N818 (an assertion)
    """A reader raised something else, hung, or gave more than one printable line."""


class Trial:
    """Mutates the file of one format, and restores it at the end.

    Args:
        name: of the format.
        folder: from `make_folder`.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.format, self.folder = name, FORMATS[name], folder
        self.path = folder / self.format.path
        self.path.parent.mkdir(exist_ok=True)
        self.original = self.path.read_bytes() if self.path.is_file() else None
        self.valid = self.format.make() if self.format.make else self.original
        assert self.valid

    def attempt(self, seed: int) -> bool:
        """Read one mutated file, and return whether it was refused.

        Raises:
            FuzzFailure: with the format and seed to repeat.
        """
        rng = random.Random(f"{self.name} {seed}")
        self.path.write_bytes(self.format.mutate(self.valid, rng))
        case = f"{self.name} {seed}"
        try:
            with _time_limit(), contextlib.redirect_stderr(io.StringIO()):
                self.format.read(self.folder)
        except (UserError, RunError) as error:
            line = str(error)
            if not line or line != printable(line) or any(char in line for char in "\n\t"):
                raise FuzzFailure(f"{case}: not one printable line: {line!r}") from None
            return True
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            trace = "".join(traceback.format_exception(error)[-6:])
            summary = f"{type(error).__name__}: {printable(error, 200)}"
            raise FuzzFailure(f"{case}: {summary}\n{trace}") from None
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.original is not None:
            self.path.write_bytes(self.original)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() != threading.main_thread():
        yield
        return

    def raise_timeout(number: int, frame: object) -> None:
        raise TimeoutError(f"no result in {TIMEOUT} seconds")

    before = signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(TIMEOUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
