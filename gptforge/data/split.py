"""Which documents are held out. The rule looks at the text alone, never at its place on the disk.

One text is cut at a character. A hundred documents or more are chosen by their hash, so that adding
data never moves one across. Fewer are cut at the boundary that comes nearest.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from gptforge.errors import UserError

Side = Literal["train", "val"]
Place = tuple[int, int]
"""A document: number of its source, and its own number in it."""
MANY = 100
"""Documents from which on they are chosen by hash."""


@dataclass(frozen=True)
class Seen:
    """What is known of a document when the rule is made."""

    place: Place
    characters: int
    digest: int


@dataclass(frozen=True)
class Split:
    """The rule that a data set is divided by."""

    rule: Literal["none", "character", "boundary", "hash"]
    fraction: float
    cut: int = 0
    """Character of a single text where the held-out part begins."""
    first: Place = (0, 0)
    """With few documents: the first that is held out."""
    exceptions: Mapping[str, Side] = field(default_factory=dict)
    """By hash, in hexadecimal: what keeps a side from being empty."""
    marks: bool = True
    """Whether each document stands behind an end-of-text mark: if there is more than one."""

    def side(self, place: Place, digest: int) -> Side:
        """Where a whole document belongs."""
        if self.rule == "boundary":
            return "val" if place >= self.first else "train"
        if self.rule == "hash":
            chosen: Side = "val" if digest < int(self.fraction * 2**64) else "train"
            return self.exceptions.get(f"{digest:016x}", chosen)
        return "train"

    def to_json(self) -> dict[str, object]:
        """The rule as it is written into the index."""
        return asdict(self)


def digest_of(text: str) -> int:
    """64 bits that stand for a document: the first of the SHA-256 of its UTF-8 bytes."""
    return digest_from(hashlib.sha256(text.encode("utf-8")).digest())


def digest_from(sha256: bytes) -> int:
    """The same, of a hash that is there already."""
    return int.from_bytes(sha256[:8], "big")


def make_split(seen: Sequence[Seen], fraction: float) -> Split:
    """The rule for a data set, from its first hundred documents, or all where there are fewer.

    Raises:
        UserError: if one side would be empty.
    """
    assert seen, "that there is a document is checked before"
    marks = len(seen) > 1
    if fraction == 0:
        return Split("none", fraction, marks=marks)
    if len(seen) == 1:
        total = seen[0].characters
        cut = int(total * (1 - fraction))
        if cut in (0, total):
            raise UserError(
                f"--val_fraction {fraction} of {total} characters leaves one side empty: "
                "use --val_fraction 0 or more text"
            )
        return Split("character", fraction, cut=cut, marks=False)
    if len(seen) < MANY:
        return Split("boundary", fraction, first=_boundary(seen, fraction))
    return Split("hash", fraction, exceptions=_exceptions(seen, fraction))


def _boundary(seen: Sequence[Seen], fraction: float) -> Place:
    wanted = sum(document.characters for document in seen) * (1 - fraction)
    best, passed, nearest = 1, 0, float("inf")
    for number, document in enumerate(seen[:-1], 1):
        passed += document.characters
        if abs(passed - wanted) < nearest:
            best, nearest = number, abs(passed - wanted)
    return seen[best].place


def _exceptions(seen: Sequence[Seen], fraction: float) -> dict[str, Side]:
    """Of the first hundred, the one with the least hash is always held out, the one with the
    greatest never: so no side is empty, and data that comes behind them changes nothing.
    """
    digests = sorted({document.digest for document in seen[:MANY]})
    if len(digests) == 1:
        raise UserError(
            f"the first {MANY} documents are all the same: --val_fraction {fraction} would leave "
            "one side empty; leave them out, or use --val_fraction 0"
        )
    forced: dict[str, Side] = {}
    limit = int(fraction * 2**64)
    if digests[0] >= limit:
        forced[f"{digests[0]:016x}"] = "val"
    if digests[-1] < limit:
        forced[f"{digests[-1]:016x}"] = "train"
    return forced
