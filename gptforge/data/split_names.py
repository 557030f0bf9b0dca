"""Splits that files already have: names that say train, validation or test.

A name is divided into words at everything that is not a letter: `data-validation-00001.parquet`
says validation, and `medieval_000.bin` says nothing. The file's own name decides; if it says
nothing, the nearest folder above it that does, below the folder that all files have in common. The
names count only if at least one file says train: a lone `dev_notes.txt` is a text like any other.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Name = Literal["train", "val", "test"]

WORDS: dict[str, Name] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
LETTERS = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class NamedSplit:
    """What the names of files say, as indices into the list of them."""

    val: tuple[int, ...] = ()
    """Held out."""
    test: tuple[int, ...] = ()
    """Left out altogether."""

    def __bool__(self) -> bool:
        return bool(self.val or self.test)


def split_by_name(paths: Sequence[Path], *, needs_train: bool = True) -> NamedSplit:
    """Which files are held out and which are left out, by their names.

    Args:
        paths: all files of an input.
        needs_train: whether the names count only if at least one of them says train.
    """
    if len(paths) < 2:
        return NamedSplit()
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 (links stay names)
    try:
        above = len(Path(os.path.commonpath([path.parent for path in absolute])).parts)
    except ValueError:
        # On several drives.
        above = 1
    names = [_name_of(path.parts[above:]) for path in absolute]
    if needs_train and "train" not in names:
        return NamedSplit()
    return NamedSplit(
        tuple(i for i, name in enumerate(names) if name == "val"),
        tuple(i for i, name in enumerate(names) if name == "test"),
    )


def describe(split: NamedSplit, paths: Sequence[Path], *, holds_out: bool) -> str:
    """One line on what is done by the names; empty if they say nothing."""
    if not split:
        return ""
    parts = []
    if split.val and holds_out:
        parts.append(f"held out as named: {_listed(split.val, paths)}")
    elif split.val:
        parts.append(f"left out, since nothing is held out: {_listed(split.val, paths)}")
    if split.test:
        parts.append(f"left out as named: {_listed(split.test, paths)}")
    return f"{'; '.join(parts)} (--split_by_name false takes them like all others)"


def _name_of(parts: Sequence[str]) -> Name | None:
    for part in reversed(parts):
        found = {WORDS[word] for word in LETTERS.findall(part.lower()) if word in WORDS}
        # train_test.txt says nothing.
        if len(found) == 1:
            return found.pop()
    return None


def _listed(numbers: Sequence[int], paths: Sequence[Path]) -> str:
    names = ", ".join(paths[number].as_posix() for number in numbers[:3])
    return names if len(numbers) <= 3 else f"{names} and {len(numbers) - 3:,} more"
