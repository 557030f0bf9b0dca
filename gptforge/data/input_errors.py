"""Unusable input: an error that names the place, or, with --skip_bad, skipped and counted."""

from collections import Counter
from dataclasses import dataclass, field

from gptforge.errors import UserError
from gptforge.printable import printable

MAX_EXAMPLES = 5  # locations listed for each kind of problem


class BadInput(Exception):  # noqa: N818 (with --skip_bad it is counted, not an error)
    """Input that is not usable text; equal problems are counted together.

    `location` is the file, and the line or row group if known; `hint` says how to fix it.
    """

    def __init__(self, problem: str, location: str = "", hint: str = "") -> None:
        super().__init__(problem, location, hint)
        self.problem, self.location, self.hint = problem, location, hint


class BadInputError(UserError):
    """Bad input without --skip_bad.

    `problem` names the location; `can_skip` says whether any input is left if this is skipped.
    """

    def __init__(self, problem: str, hint: str, can_skip: bool = True) -> None:
        # Exception.args must rebuild it: errors of worker processes are pickled.
        super().__init__(problem, hint, can_skip)
        self.problem, self.hint, self.can_skip = problem, hint, can_skip

    def __str__(self) -> str:
        skip = ", or skip such input with --skip_bad true" if self.can_skip else ""
        return printable(f"{self.problem}: {self.hint}{skip}")


@dataclass
class BadInputHandler:
    """Counts bad input if `skip` is set, otherwise raises at the first."""

    skip: bool = False
    counts: Counter[str] = field(default_factory=Counter)  # by problem
    examples: list[str] = field(default_factory=list)  # the first of each problem, with locations
    hints: list[str] = field(default_factory=list)  # how to fix each of the examples
    notices: set[str] = field(default_factory=set)  # what was repaired, such as replaced bytes

    def handle(self, bad: BadInput, location: str = "") -> None:
        """Count bad input, at `location` if it does not know its own, or raise a BadInputError."""
        example, hint = f"{location or bad.location}: {bad.problem}", bad.hint or "fix it"
        if not self.skip:
            raise BadInputError(example, hint)
        self.counts[bad.problem] += 1
        if self.counts[bad.problem] <= MAX_EXAMPLES:
            self.examples.append(example)
            self.hints.append(hint)
