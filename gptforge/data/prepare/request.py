"""What to prepare: the request, and the files that it selects."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from gptforge import files
from gptforge.data.prepare.sources import (
    FileKind,
    Source,
    count_ignored_files,
    find_sources,
)
from gptforge.data.prepare.split import describe_filename_splits, split_by_name
from gptforge.data.prepare.text_io import TextFormat
from gptforge.printable import pluralize
from gptforge.tokenizers import Tokenizer

FINGERPRINT_BYTES = 2**16  # at each end of a file
MAX_SUFFIXES = 5  # suffixes of ignored files that are listed


class ProgressBar(Protocol):
    """Shows the progress of a preparation."""

    def start(self, total: int, done: int) -> None:
        """Show the bytes of all files, and those done by an earlier process."""

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Add bytes of the files, and of their text, that are done."""


@dataclass(frozen=True)
class PrepareRequest:
    """A data set to prepare."""

    names: tuple[str, ...]  # files, folders, patterns and pipes; - is standard input
    tokenizer: str | Tokenizer = "gpt2"  # or its name or file; char and bpe are made from the text
    vocab_size: int = 0  # ids of "bpe"; 0: by the size of the text
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    kind: FileKind | Literal["auto"] = "auto"  # auto: by the suffix of each file
    shard_bytes: int = 2**26  # bytes of input files per shard
    split_by_name: bool = True  # hold out files named validation, ignore those named test
    needs_val: bool = False  # hold out such files even if val_fraction is 0
    skip_bad: bool = False
    raw_bin: bool = False  # one file for each split, without a header, as nanoGPT writes them
    sources: Sequence[Source] = ()  # the files, if `find_sources` has been called already
    cache_key: str = ""  # empty: a hash of the files' names and dates, and the options


@dataclass(frozen=True)
class FileSelection:
    """The files to read, the indices of those held out by name, and notices for the user."""

    sources: list[Source]
    val_sources: tuple[int, ...]
    notices: tuple[str, ...]


def select_files(request: PrepareRequest, *, spool_dir: Path | None = None) -> FileSelection:
    """Select the files that a request reads; `spool_dir` gets the content of pipes.

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
    """Return 16 hexadecimal digits of a hash of a file's size, first and last bytes.

    This is cheap for a file of any size, but misses changes in the middle.
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
