"""What to prepare: the request, and the files that it selects."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from gptforge import files
from gptforge.data.prepare.sources import FileKind, Source, count_ignored_files, find_sources
from gptforge.data.prepare.split import describe_filename_splits, split_by_name
from gptforge.data.prepare.text_io import TextFormat
from gptforge.printable import pluralize
from gptforge.tokenizers import Tokenizer

FINGERPRINT_BYTES = 2**16  # at each end of a file
MAX_SUFFIXES = 5  # suffixes of ignored files that are listed


class ProgressBar(Protocol):
    """Shows how far the work is."""

    def start(self, total: int, done: int) -> None:
        """Show the total bytes of the files, and those done by an earlier process."""
        ...

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Add bytes of the files, and of their text, that are done."""
        ...


@dataclass(frozen=True)
class PrepareRequest:
    """A data set to prepare.

    Attributes:
        names: files, folders, patterns and pipes; - is standard input.
        tokenizer: a tokenizer, its name or its file; "char" is made from the text.
        val_fraction: share of the text to hold out.
        text_format: how to read text from the files.
        kind: what the files hold; auto goes by their names.
        shard_bytes: about so many bytes of the files go into a shard.
        split_by_name: hold out files whose names say validation, and ignore those that say test.
        needs_val: hold out such files even if `val_fraction` is 0.
        skip_bad: skip what cannot be read.
        raw_bin: write one file for each split, without a header, as nanoGPT does.
        sources: the files, if they are known already.
        cache_key: identifies the request; empty: names and dates of the files, and the options.
    """

    names: tuple[str, ...]
    tokenizer: str | Tokenizer = "gpt2"
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    kind: FileKind | Literal["auto"] = "auto"
    shard_bytes: int = 2**26
    split_by_name: bool = True
    needs_val: bool = False
    skip_bad: bool = False
    raw_bin: bool = False
    sources: Sequence[Source] = ()
    cache_key: str = ""


@dataclass(frozen=True)
class FileSelection:
    """The files to read, the indices of those held out by name, and notices for the user."""

    sources: list[Source]
    val_sources: tuple[int, ...]
    notices: tuple[str, ...]


def select_files(request: PrepareRequest, *, spool_dir: Path | None = None) -> FileSelection:
    """Select the files that a request reads.

    Args:
        request: names the files.
        spool_dir: folder for the content of standard input and pipes.

    Raises:
        UserError: as `find_sources`.
    """
    sources = list(request.sources) or find_sources(
        request.names, kind=request.kind, spool_dir=spool_dir
    )
    notices = [notice for name in request.names if (notice := _describe_ignored_files(name))]
    val_sources: tuple[int, ...] = ()
    if request.split_by_name:
        paths = [source.path for source in sources]
        named = split_by_name(paths)
        uses_val = request.val_fraction > 0 or request.needs_val
        ignored = {*named.test, *(() if uses_val else named.val)}
        selected = [index for index in range(len(sources)) if index not in ignored]
        if uses_val:
            val_sources = tuple(i for i, index in enumerate(selected) if index in named.val)
        if notice := describe_filename_splits(named, paths, uses_val=uses_val):
            notices.append(notice)
        sources = [sources[index] for index in selected]
    notices += _describe_copies(sources, val_sources)
    return FileSelection(sources, val_sources, tuple(notices))


def fingerprint(path: Path) -> str:
    """Return 16 hexadecimal digits that identify a file: of its size, its first and last bytes.

    It is cheap for a file of any size, but misses changes in the middle.
    """
    sha256, size = hashlib.sha256(), path.stat().st_size
    sha256.update(f"{size}\n".encode())
    with path.open("rb") as file:
        sha256.update(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        sha256.update(file.read(FINGERPRINT_BYTES))
    return sha256.hexdigest()[:16]


def _describe_copies(sources: Sequence[Source], val_sources: Sequence[int]) -> list[str]:
    val = {sources[index] for index in val_sources}
    sizes = Counter(source.size for source in sources)
    candidates: dict[tuple[int, str], list[Source]] = defaultdict(list)
    for source in sources:
        if source.size and sizes[source.size] > 1:
            candidates[source.size, fingerprint(source.path)].append(source)
    num_copies, example, in_both_splits = 0, "", False
    for group in candidates.values():
        originals: dict[str, Source] = {}
        for source in group if len(group) > 1 else ():
            original = originals.setdefault(files.sha256(source.path), source)
            if original is not source:
                num_copies += 1
                in_both_splits |= (original in val) != (source in val)
                example = example or f"{source.name} is a copy of {original.name}"
    if not num_copies:
        return []
    more = "" if num_copies == 1 else f", and so are {num_copies - 1:,} more files"
    effect = "held-out text is trained on" if in_both_splits else "the text is read again"
    return [f"{example}{more}: {effect}"]


def _describe_ignored_files(name: str) -> str:
    counts = count_ignored_files(name)
    if not counts:
        return ""
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MAX_SUFFIXES)]
    if others := sum(count for _, count in counts.most_common()[MAX_SUFFIXES:]):
        listed.append(f"{others:,} others")
    subject = pluralize(counts.total(), "file is", "files are")
    return f"{subject} ignored in {name}, by suffix: {', '.join(listed)}"
