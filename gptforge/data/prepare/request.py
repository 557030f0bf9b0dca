"""Which of the files that were named are read, which of them are held out, and why."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from gptforge import files
from gptforge.data.prepare.sources import FileKind, Source, count_ignored_files, find_sources
from gptforge.data.prepare.split import describe_filename_splits, split_by_name
from gptforge.data.prepare.text_io import TextFormat
from gptforge.tokenizers import Tokenizer

Log = Callable[[str], None]


class ProgressBar(Protocol):
    """Shows how far the work is."""

    def start(self, total: int, done: int) -> None:
        """So many bytes there are, and so many were done before."""
        ...

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """So many more bytes of the files are done, and so many bytes of text."""
        ...


class NoProgressBar:
    """No meter."""

    def start(self, total: int, done: int) -> None:
        """Show nothing."""

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class PrepareRequest:
    """What is to be made of what."""

    names: tuple[str, ...]
    """Files, folders, patterns, pipes, - for standard input."""
    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    kind: FileKind | Literal["auto"] = "auto"
    shard_bytes: int = 2**26
    """Bytes of the files that go into a shard, more or less."""
    split_by_name: bool = True
    """Whether files whose names say validation are held out, and those that say test left out."""
    needs_val: bool = False
    """Whether such files are held out though no share is asked for."""
    skip_bad: bool = False
    raw_bin: bool = False
    """One file for each side, without a header, as nanoGPT reads them."""
    sources: Sequence[Source] = ()
    """The files behind the names, where they are known already."""
    cache_key: str = ""
    """What tells this request from others; empty: names and dates of the files, and the rest."""


FINGERPRINT_BYTES = 2**16
"""Bytes at either end of a file that its fingerprint is made of."""
MAX_SUFFIXES = 5
"""Suffixes of files left aside that are named."""


@dataclass(frozen=True)
class FileSelection:
    """The files to read."""

    sources: list[Source]
    val_sources: tuple[int, ...]
    """Indices of those that are held out by their names."""
    notices: tuple[str, ...]
    """What should be known about the choice, in words."""


def select_files(request: PrepareRequest, *, spool_dir: Path | None = None) -> FileSelection:
    """The files that a request reads.

    Args:
        request: what is to be made of what.
        spool_folder: where the content of standard input and of pipes is kept.

    Raises:
        UserError: as `find_sources`.
    """
    sources = list(request.sources) or find_sources(
        request.names, kind=request.kind, spool_dir=spool_dir
    )
    notices = [text for name in request.names if (text := _left_aside(name))]
    held_out: tuple[int, ...] = ()
    if request.split_by_name:
        paths = [source.path for source in sources]
        named = split_by_name(paths)
        holds_out = request.val_fraction > 0 or request.needs_val
        left_out = {*named.test, *(() if holds_out else named.val)}
        kept = [number for number in range(len(sources)) if number not in left_out]
        held_out = tuple(i for i, number in enumerate(kept) if holds_out and number in named.val)
        if text := describe_filename_splits(named, paths, uses_val=holds_out):
            notices.append(text)
        sources = [sources[number] for number in kept]
    return FileSelection(sources, held_out, (*notices, *_copies(sources, held_out)))


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits that a file is known by: of its size, its first and its last bytes.

    Cheap for a file of any size. A file that differs from another in the middle only has the same.
    """
    known, size = hashlib.sha256(), path.stat().st_size
    known.update(f"{size}\n".encode())
    with path.open("rb") as file:
        known.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        known.update(file.read(FINGERPRINT_BYTES))
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
    counts = count_ignored_files(name)
    if not counts:
        return ""
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MAX_SUFFIXES)]
    if more := sum(counts.values()) - sum(count for _, count in counts.most_common(MAX_SUFFIXES)):
        listed.append(f"{more:,} others")
    total = sum(counts.values())
    of = "file is" if total == 1 else "files are"
    return f"{total:,} {of} left aside in {name}, by suffix: {', '.join(listed)}"
