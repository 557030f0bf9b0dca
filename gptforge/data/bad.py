"""What cannot be read: an error that says where, or, if asked, left out and counted."""

from collections import Counter
from dataclasses import dataclass, field

from gptforge.errors import UserError
from gptforge.printable import printable

EXAMPLES = 5
"""Places of each kind that are named at the end."""


class BadInput(Exception):  # noqa: N818 (it is not always an error)
    """Something in the input that is no text; the message says where."""

    def __init__(self, kind: str, where: str, remedy: str = "") -> None:
        super().__init__(kind, where, remedy)
        self.kind, self.where, self.remedy = kind, where, remedy


class RefusedError(UserError):
    """Bad input that nobody asked to leave out; the message names flags of `gptforge prepare`.

    Args:
        what: where something is wrong, and what it is.
        remedy: what can be done about it.
        leaves_some: whether anything would be left without it.
    """

    def __init__(self, what: str, remedy: str, leaves_some: bool = True) -> None:
        # Its arguments are what another process makes it from.
        super().__init__(what, remedy, leaves_some)
        self.what, self.remedy, self.leaves_some = what, remedy, leaves_some

    def __str__(self) -> str:
        skip = ", or leave such things out with --skip_bad true" if self.leaves_some else ""
        return printable(f"{self.what}: {self.remedy}{skip}")


@dataclass
class Skipped:
    """The judge of bad input, and the count of what was left out."""

    allowed: bool
    """Whether to go on without it; otherwise the first one is an error."""
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    """What can be done about each example."""
    notices: set[str] = field(default_factory=set)
    """What was put right on the way, in words."""

    def add(self, bad: BadInput) -> None:
        """Count it, or raise RefusedError."""
        if not self.allowed:
            raise RefusedError(f"{bad.where}: {bad.kind}", bad.remedy or "mend it")
        self.counts[bad.kind] += 1
        if self.counts[bad.kind] <= EXAMPLES:
            self.examples.append(f"{bad.where}: {bad.kind}")
            self.remedies.append(bad.remedy or "mend it")
