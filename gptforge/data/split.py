"""Which documents are held out. The rule looks at the text alone, never at its place on the disk.

One text is cut at a character. A hundred documents or more are chosen by their hash, so that adding
data never moves one across. Fewer are cut at the boundary that comes nearest. Files whose names say
validation are held out as they are (`split_names`).
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

    rule: Literal["none", "character", "boundary", "hash", "files"]
    fraction: float
    cut: int = 0
    """Character of a single text where the held-out part begins."""
    first: Place = (0, 0)
    """With few documents: the first that is held out."""
    exceptions: Mapping[str, Side] = field(default_factory=dict)
    """By hash, in hexadecimal: what keeps a side from being empty, and copies on one side."""
    held_out: tuple[int, ...] = ()
    """By the rule "files": the numbers of the sources that are held out."""
    marks: bool = True
    """Whether each document stands behind an end-of-text mark: if there is more than one."""

    def side(self, place: Place, digest: int) -> Side:
        """Where a whole document belongs."""
        if self.rule == "files":
            return "val" if place[0] in self.held_out else "train"
        if self.rule == "boundary":
            chosen: Side = "val" if place >= self.first else "train"
            return self.exceptions.get(f"{digest:016x}", chosen)
        if self.rule == "hash":
            chosen = "val" if digest < int(self.fraction * 2**64) else "train"
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


def make_split(seen: Sequence[Seen], fraction: float, *, part_copies: bool = False) -> Split:
    """The rule for a data set, from its first hundred documents, or all where there are fewer.

    With `part_copies` the copies of one of a few documents may land on both sides.

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
        first = _boundary(seen, fraction)
        forced = {} if part_copies else _together(seen, first)
        return Split("boundary", fraction, first=first, exceptions=forced)
    return Split("hash", fraction, exceptions=_exceptions(seen, fraction))


def _boundary(seen: Sequence[Seen], fraction: float) -> Place:
    wanted = sum(document.characters for document in seen) * (1 - fraction)
    best, passed, nearest = 1, 0, float("inf")
    for number, document in enumerate(seen[:-1], 1):
        passed += document.characters
        if abs(passed - wanted) < nearest:
            best, nearest = number, abs(passed - wanted)
    return seen[best].place


def _together(seen: Sequence[Seen], first: Place) -> dict[str, Side]:
    """Copies that lie on both sides of the boundary are learned, if something else is held out.

    Where all documents are the same nothing can be told apart: they stay where they are.
    """
    sides: dict[Side, set[int]] = {"train": set(), "val": set()}
    for document in seen:
        sides["val" if document.place >= first else "train"].add(document.digest)
    both = sides["train"] & sides["val"]
    goes_to: Side = "train"
    if both and both == sides["val"]:
        if both == sides["train"]:
            if len(both) == 1:
                return {}
            # Each is there twice: the last one is held out, with all its copies.
            last = seen[-1].digest
            return {f"{one:016x}": "val" if one == last else "train" for one in sorted(both)}
        goes_to = "val"
    return {f"{one:016x}": goes_to for one in sorted(both)}


def _exceptions(seen: Sequence[Seen], fraction: float) -> dict[str, Side]:
    """Of the first hundred, the one with the least hash is always held out, the one with the
    greatest never: so no side is empty, and data that comes behind them changes nothing.
    """
    digests = sorted({document.digest for document in seen[:MANY]})
    if len(digests) == 1:
        raise UserError(
            f"the first {MANY} documents are all the same: --val_fraction {fraction} would leave "
            "one side empty; leave the copies out, or use --val_fraction 0"
        )
    forced: dict[str, Side] = {}
    limit = int(fraction * 2**64)
    if digests[0] >= limit:
        forced[f"{digests[0]:016x}"] = "val"
    if digests[-1] < limit:
        forced[f"{digests[-1]:016x}"] = "train"
    return forced
