"""Runs mutations of a format in this process; reports what is neither refused nor works."""

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

HANGS = 30
"""Seconds after which a reader is taken to hang."""


class Found(AssertionError):  # noqa: N818
    """A mutation that raised something else, hung, or gave a message that is not one clean line."""


class Trial:
    """Mutations of one format; the good file is put back at the end.

    Args:
        name: of the format.
        folder: furnished scratch folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind, self.folder = name, FORMATS[name], folder
        self.path = folder / self.kind.path
        self.path.parent.mkdir(exist_ok=True)
        self.before = self.path.read_bytes() if self.path.is_file() else None
        self.good = self.kind.good() if self.kind.good else self.before
        assert self.good

    def attempt(self, seed: int) -> bool:
        """One mutation; whether it was refused.

        Raises:
            Found: with the round to repeat.
        """
        dice = random.Random(f"{self.name} {seed}")
        self.path.write_bytes(self.kind.mutate(self.good, dice))
        where = f"{self.name} {seed}"
        try:
            with _not_for_ever(), contextlib.redirect_stderr(io.StringIO()):
                self.kind.read(self.folder)
        except (UserError, RunError) as error:
            line = str(error)
            if not line or line != printable(line) or any(char in line for char in "\n\t"):
                raise Found(f"{where}: not one printable line: {line!r}") from None
            return True
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            told = "".join(traceback.format_exception(error)[-6:])
            what = f"{type(error).__name__}: {printable(error, 200)}"
            raise Found(f"{where}: {what}\n{told}") from None
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)
        if self.before is not None:
            self.path.write_bytes(self.before)


@contextlib.contextmanager
def _not_for_ever() -> Iterator[None]:
    if not hasattr(signal, "SIGALRM") or threading.current_thread() != threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"no answer in {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
