"""Patterns of file names, as `--input` and `prepare` take them."""

import os
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path

from gptforge.files import real_path


def expand_glob(pattern: str) -> list[Path]:
    """The sorted matches of a pattern with `*`, `?`, `[]` and `**`.

    Unlike `glob`, it takes a name literally where a file of that name exists, and `**` enters each
    folder once, however many links lead there. Hidden files match only patterns that have the dot.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    found = {Path(path.anchor)}
    for part in (*parts, "*") if parts[-1:] == ("**",) else parts:
        if part == "**":
            found = set(_walk(found))
        else:
            found = {match for base in found for match in _matches(base, part)}
    return sorted(found, key=str)


def _matches(base: Path, part: str) -> list[Path]:
    if os.path.lexists(base / part):
        return [base / part]
    names = glob(part, root_dir=base) if has_magic(part) else []  # noqa: PTH207 (relative names)
    return [base / name for name in names]


def _walk(bases: Iterable[Path]) -> Iterator[Path]:
    """These folders and all below them, each once."""
    seen = set()
    for base in sorted(bases):
        for name, subfolders, _ in os.walk(base, followlinks=True):
            if (folder := real_path(name)) in seen:
                subfolders.clear()
            else:
                seen.add(folder)
                yield Path(name)
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))


def is_inside(folder: Path, name: str) -> bool:
    """Whether a path, or any match of a glob pattern, lies in a folder."""
    folder = real_path(folder)
    return any(real_path(path).is_relative_to(folder) for path in [Path(name), *expand_glob(name)])
