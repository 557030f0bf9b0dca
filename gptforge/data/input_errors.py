"""What cannot be read: an error that says where, or, if asked, left out and counted."""

from collections import Counter
from dataclasses import dataclass, field

from gptforge.errors import UserError
from gptforge.printable import printable

MAX_EXAMPLES = 5
"""Places of each kind that are named at the end."""


class BadInput(Exception):  # noqa: N818 (it is not always an error)
    """Something in the input that is no text; the message says where."""

    def __init__(self, problem: str, location: str, hint: str = "") -> None:
        super().__init__(problem, location, hint)
        self.problem, self.location, self.hint = problem, location, hint


class BadInputError(UserError):
    """Bad input that nobody asked to leave out; the message names flags of `gptforge prepare`.

    Args:
        what: where something is wrong, and what it is.
        remedy: what can be done about it.
        leaves_some: whether anything would be left without it.
    """

    def __init__(self, problem: str, hint: str, can_skip: bool = True) -> None:
        # Its arguments are what another process makes it from.
        super().__init__(problem, hint, can_skip)
        self.problem, self.hint, self.can_skip = problem, hint, can_skip

    def __str__(self) -> str:
        skip = ", or leave such things out with --skip_bad true" if self.can_skip else ""
        return printable(f"{self.problem}: {self.hint}{skip}")


@dataclass
class BadInputHandler:
    """The judge of bad input, and the count of what was left out."""

    skip: bool
    """Whether to go on without it; otherwise the first one is an error."""
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    """What can be done about each example."""
    notices: set[str] = field(default_factory=set)
    """What was put right on the way, in words."""

    def handle(self, bad: BadInput) -> None:
        """Count it, or raise RefusedError."""
        if not self.skip:
            raise BadInputError(f"{bad.location}: {bad.problem}", bad.hint or "mend it")
        self.counts[bad.problem] += 1
        if self.counts[bad.problem] <= MAX_EXAMPLES:
            self.examples.append(f"{bad.location}: {bad.problem}")
            self.hints.append(bad.hint or "mend it")
