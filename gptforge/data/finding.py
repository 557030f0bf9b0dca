"""What was found out about data or a machine, in words, and how bad it is."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing, and what to do about it."""

    level: Literal["good", "warning", "error"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}" if self.remedy else self.what


def counted(number: int, one: str, several: str) -> str:
    """A number of things in words: '1 document', '2 documents'."""
    return f"{number:,} {one if number == 1 else several}"


def good(what: str) -> Finding:
    """As it should be."""
    return Finding("good", what)


def warning(what: str, remedy: str = "") -> Finding:
    """Worth a look; work goes on."""
    return Finding("warning", what, remedy)


def error(what: str, remedy: str = "") -> Finding:
    """Nothing good would come of it."""
    return Finding("error", what, remedy)
