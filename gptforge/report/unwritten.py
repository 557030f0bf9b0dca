"""What the ranks behind the first have for a report: nothing is said, and nothing written."""

from collections.abc import Mapping
from typing import Any

from gptforge.report.console import PlainConsole
from gptforge.report.run_report import RunReport


class Silence(PlainConsole):
    """A console that nobody looks at."""

    def say(self, text: str) -> None:
        """Rank 0 says it."""


class Unwritten(RunReport):
    """As `RunReport`, without files."""

    def clear(self) -> None:
        """Rank 0 does it."""

    def redraw(self, *, force: bool = False) -> None:
        """Rank 0 draws."""

    def end(self, reason: str, **facts: Any) -> None:
        """Rank 0 closes the log."""

    def sizes(self) -> dict[str, int]:
        """Of no files."""
        return {}

    def _cut(self, sizes: Mapping[str, int]) -> None:
        pass

    def _write(self, name: str, text: str) -> None:
        pass
