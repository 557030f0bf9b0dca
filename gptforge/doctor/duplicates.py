"""Duplicate documents, by 64 bits of their hash."""

from dataclasses import dataclass, field

from gptforge.findings import Finding, warning
from gptforge.printable import pluralize

MAX_DOCUMENTS = 4_000_000  # remembered: with more, memory would grow with the data


@dataclass
class Duplicates:
    """Counts documents that were seen before, in the same split or in the other one."""

    in_one_split: int = 0
    in_both_splits: int = 0
    first_in_both: str = ""
    is_full: bool = False
    _split_by_digest: dict[int, str] = field(default_factory=dict)

    def add(self, digest: int, split: str, where: str) -> None:
        """Count one more document."""
        before = self._split_by_digest.get(digest)
        if before == split:
            self.in_one_split += 1
        elif before is not None:
            self.in_both_splits += 1
            self.first_in_both = self.first_in_both or where
        elif len(self._split_by_digest) < MAX_DOCUMENTS:
            self._split_by_digest[digest] = split
        else:
            self.is_full = True

    def findings(self) -> list[Finding]:
        """A warning for each kind of duplicates."""
        found = []
        if self.in_both_splits:
            count = pluralize(self.in_both_splits, "document is", "documents are")
            hint = "the validation loss will look better than it is; remove the duplicates"
            found.append(warning(f"{count} in both splits, first {self.first_in_both}", hint))
        if self.in_one_split:
            count = pluralize(
                self.in_one_split, "document is a duplicate", "documents are duplicates"
            )
            found.append(warning(count, "the model will memorize them; remove the duplicates"))
        if self.is_full:
            found.append(warning("too many documents to search all of them for duplicates"))
        return found
