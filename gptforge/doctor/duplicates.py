"""Documents that stand twice, by 64 bits of their hash."""

from dataclasses import dataclass, field

MOST = 4_000_000
"""Documents that are remembered: with more, memory would grow with the data."""


@dataclass
class Duplicates:
    """Counts documents that were seen before, on the same side and on the other."""

    twice: int = 0
    both_sides: int = 0
    is_full: bool = False
    first: str = ""
    """Where the first that stands on both sides was found."""
    _seen: dict[int, str] = field(default_factory=dict)

    def add(self, digest: int, side: str, where: str) -> None:
        """One more document."""
        before = self._seen.get(digest)
        if before is None:
            if len(self._seen) < MOST:
                self._seen[digest] = side
            else:
                self.is_full = True
            return
        self.twice += 1
        if before != side:
            self.both_sides += 1
            self.first = self.first or where
