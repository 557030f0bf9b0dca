"""Which of the files that were named are read, which of them are held out, and why."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptforge import files
from gptforge.data.request import Request
from gptforge.data.sources import Source, find_sources, left_aside
from gptforge.data.split_names import describe, split_by_name

EDGE = 2**16
"""Bytes at either end of a file that its fingerprint is made of."""
MAX_SUFFIXES = 5
"""Suffixes of files left aside that are named."""


@dataclass(frozen=True)
class Chosen:
    """The files to read."""

    sources: list[Source]
    held_out: tuple[int, ...]
    """Indices of those that are held out by their names."""
    notices: tuple[str, ...]
    """What should be known about the choice, in words."""


def choose(request: Request, *, spool_folder: Path | None = None) -> Chosen:
    """The files that a request reads.

    Args:
        request: what is to be made of what.
        spool_folder: where the content of standard input and of pipes is kept.

    Raises:
        UserError: as `find_sources`.
    """
    sources = list(request.sources) or find_sources(
        request.names, kind=request.kind, spool_folder=spool_folder
    )
    notices = [text for name in request.names if (text := _left_aside(name))]
    held_out: tuple[int, ...] = ()
    if request.split_by_name:
        paths = [source.path for source in sources]
        named = split_by_name(paths)
        holds_out = request.val_fraction > 0 or request.is_to_judge
        left_out = {*named.test, *(() if holds_out else named.val)}
        kept = [number for number in range(len(sources)) if number not in left_out]
        held_out = tuple(i for i, number in enumerate(kept) if holds_out and number in named.val)
        if text := describe(named, paths, holds_out=holds_out):
            notices.append(text)
        sources = [sources[number] for number in kept]
    return Chosen(sources, held_out, (*notices, *_copies(sources, held_out)))


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits that a file is known by: of its size, its first and its last bytes.

    Cheap for a file of any size. A file that differs from another in the middle only has the same.
    """
    known, size = hashlib.sha256(), path.stat().st_size
    known.update(f"{size}\n".encode())
    with path.open("rb") as file:
        known.update(file.read(EDGE))
        file.seek(max(0, size - EDGE))
        known.update(file.read(EDGE))
    return known.hexdigest()[:16]


def _copies(sources: Sequence[Source], held_out: Sequence[int]) -> list[str]:
    """A line on files with the same content, if there are any."""
    judged = {sources[number] for number in held_out}
    alike: dict[tuple[int, str], list[Source]] = defaultdict(list)
    sizes = Counter(source.size for source in sources)
    for source in sources:
        if source.size and sizes[source.size] > 1:
            alike[source.size, fingerprint(source.path)].append(source)
    more, example, is_apart = 0, "", False
    for group in alike.values():
        seen: dict[str, Source] = {}
        for source in group if len(group) > 1 else ():
            first = seen.setdefault(files.sha256(source.path), source)
            if first is not source:
                more += 1
                is_apart |= (first in judged) != (source in judged)
                example = example or f"{source.name} is a copy of {first.name}"
    if not more:
        return []
    several = "" if more == 1 else f", and so are {more - 1:,} more files of others"
    what = "what is held out is learned as well" if is_apart else "the text of a copy is read again"
    return [f"{example}{several}: {what}"]


def _left_aside(name: str) -> str:
    """A line on the files of a folder that are not read."""
    counts = left_aside(name)
    if not counts:
        return ""
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MAX_SUFFIXES)]
    if more := sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_SUFFIXES)):
        listed.append(f"{more:,} others")
    total = sum(counts.values())
    of = "file is" if total == 1 else "files are"
    return f"{total:,} {of} left aside in {name}, by suffix: {', '.join(listed)}"
