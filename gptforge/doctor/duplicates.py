"""Documents that stand twice, by 64 bits of their hash."""

from dataclasses import dataclass, field

MAX_DOCUMENTS = 4_000_000
"""Documents that are remembered: with more, memory would grow with the data."""


@dataclass
class Duplicates:
    """Counts documents that were seen before, on the same side and on the other."""

    repeated: int = 0
    in_both_splits: int = 0
    is_full: bool = False
    first_in_both: str = ""
    """Where the first that stands on both sides was found."""
    _seen: dict[int, str] = field(default_factory=dict)

    def add(self, digest: int, split: str, where: str) -> None:
        """One more document."""
        before = self._seen.get(digest)
        if before is None:
            if len(self._seen) < MAX_DOCUMENTS:
                self._seen[digest] = split
            else:
                self.is_full = True
            return
        self.repeated += 1
        if before != split:
            self.in_both_splits += 1
            self.first_in_both = self.first_in_both or where
