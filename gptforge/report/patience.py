"""For whoever waits: how long it still takes, said once, if that is long."""

import time

from gptforge.printable import print_note
from gptforge.report.duration import in_words

FEW = 3
"""Parts behind which a guess is made: the first one pays for warming up."""
LONG = 5.0
"""Seconds from which on it is said."""


class Patience:
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
        if self._parts >= FEW and seconds > LONG and not self._is_told:
            self._is_told = True
            print_note(f"{self._what} takes about {in_words(seconds)} more")
