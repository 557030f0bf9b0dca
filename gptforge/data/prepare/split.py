"""Which documents are held out. The rule looks at the text alone, never at its place on the disk.

One text is cut at a character. A hundred documents or more are chosen by their hash, so that adding
data never moves one across. Fewer are cut at the boundary that comes nearest. Files whose names say
validation are held out as they are (`split_names`).
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from gptforge.errors import UserError

SplitName = Literal["train", "val"]
DocumentId = tuple[int, int]
"""A document: number of its source, and its own number in it."""
MIN_HASH_DOCUMENTS = 100
"""Documents from which on they are chosen by hash."""


@dataclass(frozen=True)
class DocumentStats:
    """What is known of a document when the rule is made."""

    id: DocumentId
    num_chars: int
    digest: int


@dataclass(frozen=True)
class SplitRule:
    """The rule that a data set is divided by."""

    rule: Literal["none", "character", "boundary", "hash", "files"]
    fraction: float
    cut: int = 0
    """Character of a single text where the held-out part begins."""
    first_val: DocumentId = (0, 0)
    """With few documents: the first that is held out."""
    exceptions: Mapping[str, SplitName] = field(default_factory=dict)
    """By hash, in hexadecimal: what keeps a side from being empty, and copies on one side."""
    val_sources: tuple[int, ...] = ()
    """By the rule "files": the numbers of the sources that are held out."""
    prepend_eot: bool = True
    """Whether each document stands behind an end-of-text mark: if there is more than one."""

    def assign(self, document_id: DocumentId, digest: int) -> SplitName:
        """Where a whole document belongs."""
        if self.rule == "files":
            return "val" if document_id[0] in self.val_sources else "train"
        if self.rule == "boundary":
            chosen: SplitName = "val" if document_id >= self.first_val else "train"
            return self.exceptions.get(f"{digest:016x}", chosen)
        if self.rule == "hash":
            chosen = "val" if digest < int(self.fraction * 2**64) else "train"
            return self.exceptions.get(f"{digest:016x}", chosen)
        return "train"

    def to_json(self) -> dict[str, object]:
        """The rule as it is written into the index."""
        return asdict(self)


def text_digest(text: str) -> int:
    """64 bits that stand for a document: the first of the SHA-256 of its UTF-8 bytes."""
    return digest_from_sha256(hashlib.sha256(text.encode("utf-8")).digest())


def digest_from_sha256(sha256: bytes) -> int:
    """The same, of a hash that is there already."""
    return int.from_bytes(sha256[:8], "big")


def make_split_rule(
    documents: Sequence[DocumentStats], val_fraction: float, *, split_duplicates: bool = False
) -> SplitRule:
    """The rule for a data set, from its first hundred documents, or all where there are fewer.

    With `part_copies` the copies of one of a few documents may land on both sides.

    Raises:
        UserError: if one side would be empty.
    """
    assert documents, "that there is a document is checked before"
    marks = len(documents) > 1
    if val_fraction == 0:
        return SplitRule("none", val_fraction, prepend_eot=marks)
    if len(documents) == 1:
        total = documents[0].num_chars
        cut = int(total * (1 - val_fraction))
        if cut in (0, total):
            raise UserError(
                f"--val_fraction {val_fraction} of {total} characters leaves one side empty: "
                "use --val_fraction 0 or more text"
            )
        return SplitRule("character", val_fraction, cut=cut, prepend_eot=False)
    if len(documents) < MIN_HASH_DOCUMENTS:
        first = _boundary(documents, val_fraction)
        forced = {} if split_duplicates else _together(documents, first)
        return SplitRule("boundary", val_fraction, first_val=first, exceptions=forced)
    return SplitRule("hash", val_fraction, exceptions=_exceptions(documents, val_fraction))


def _boundary(seen: Sequence[DocumentStats], fraction: float) -> DocumentId:
    wanted = sum(document.num_chars for document in seen) * (1 - fraction)
    best, passed, nearest = 1, 0, float("inf")
    for number, document in enumerate(seen[:-1], 1):
        passed += document.num_chars
        if abs(passed - wanted) < nearest:
            best, nearest = number, abs(passed - wanted)
    return seen[best].id


def _together(seen: Sequence[DocumentStats], first: DocumentId) -> dict[str, SplitName]:
    """Copies that lie on both sides of the boundary are learned, if something else is held out.

    Where all documents are the same nothing can be told apart: they stay where they are.
    """
    sides: dict[SplitName, set[int]] = {"train": set(), "val": set()}
    for document in seen:
        sides["val" if document.id >= first else "train"].add(document.digest)
    both = sides["train"] & sides["val"]
    goes_to: SplitName = "train"
    if both and both == sides["val"]:
        if both == sides["train"]:
            if len(both) == 1:
                return {}
            # Each is there twice: the last one is held out, with all its copies.
            last = seen[-1].digest
            return {f"{one:016x}": "val" if one == last else "train" for one in sorted(both)}
        goes_to = "val"
    return {f"{one:016x}": goes_to for one in sorted(both)}


def _exceptions(seen: Sequence[DocumentStats], fraction: float) -> dict[str, SplitName]:
    """Of the first hundred, the one with the least hash is always held out, the one with the
    greatest never: so no side is empty, and data that comes behind them changes nothing.
    """
    digests = sorted({document.digest for document in seen[:MIN_HASH_DOCUMENTS]})
    if len(digests) == 1:
        raise UserError(
            f"the first {MIN_HASH_DOCUMENTS} documents are all the same: --val_fraction {fraction} would leave "
            "one side empty; leave the copies out, or use --val_fraction 0"
        )
    forced: dict[str, SplitName] = {}
    limit = int(fraction * 2**64)
    if digests[0] >= limit:
        forced[f"{digests[0]:016x}"] = "val"
    if digests[-1] < limit:
        forced[f"{digests[-1]:016x}"] = "train"
    return forced


SplitWord = Literal["train", "val", "test"]

SPLIT_WORDS: dict[str, SplitWord] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class FilenameSplits:
    """What the names of files say, as indices into the list of them."""

    val: tuple[int, ...] = ()
    """Held out."""
    test: tuple[int, ...] = ()
    """Left out altogether."""

    def __bool__(self) -> bool:
        return bool(self.val or self.test)


def split_by_name(paths: Sequence[Path], *, require_train: bool = True) -> FilenameSplits:
    """Which files are held out and which are left out, by their names.

    Args:
        paths: all files of an input.
        needs_train: whether the names count only if at least one of them says train.
    """
    if len(paths) < 2:
        return FilenameSplits()
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 (links stay names)
    try:
        above = len(Path(os.path.commonpath([path.parent for path in absolute])).parts)
    except ValueError:
        # On several drives.
        above = 1
    names = [_name_of(path.parts[above:]) for path in absolute]
    if require_train and "train" not in names:
        return FilenameSplits()
    return FilenameSplits(
        tuple(i for i, name in enumerate(names) if name == "val"),
        tuple(i for i, name in enumerate(names) if name == "test"),
    )


def describe_filename_splits(
    named: FilenameSplits, paths: Sequence[Path], *, uses_val: bool
) -> str:
    """One line on what is done by the names; empty if they say nothing."""
    if not named:
        return ""
    parts = []
    if named.val and uses_val:
        parts.append(f"held out as named: {_listed(named.val, paths)}")
    elif named.val:
        parts.append(f"left out, since nothing is held out: {_listed(named.val, paths)}")
    if named.test:
        parts.append(f"left out as named: {_listed(named.test, paths)}")
    return f"{'; '.join(parts)} (--split_by_name false takes them like all others)"


def _name_of(parts: Sequence[str]) -> SplitWord | None:
    for part in reversed(parts):
        found = {SPLIT_WORDS[word] for word in LETTERS.findall(part.lower()) if word in SPLIT_WORDS}
        # train_test.txt says nothing.
        if len(found) == 1:
            return found.pop()
    return None


def _listed(numbers: Sequence[int], paths: Sequence[Path]) -> str:
    names = ", ".join(paths[number].as_posix() for number in numbers[:3])
    return names if len(numbers) <= 3 else f"{names} and {len(numbers) - 3:,} more"
