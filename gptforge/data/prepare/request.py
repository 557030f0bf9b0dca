"""What to prepare: the request, the files that it selects, and about how much text they hold."""

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from gptforge import files
from gptforge.data.prepare.sources import (
    FileKind,
    KindFlag,
    Source,
    find_sources,
)
from gptforge.data.prepare.split import describe_filename_splits, split_by_name, split_shards
from gptforge.data.prepare.text_io import TextFormat
from gptforge.data.shard_index import read_index
from gptforge.tokenizers import Tokenizer

_KINDS_WITH: dict[str, dict[FileKind, str]] = {
    "field": {"jsonl": "JSON", "csv": "CSV", "parquet": "Parquet"},
    "encoding": {"text": "text", "jsonl": "JSON", "csv": "CSV"},
    "split_on": {"text": "text"},
}
"""The kinds of files that a flag of `TextFormat` has an effect on."""
RAW_BIN_UNUSED = "--raw_bin has no effect: the input is not a .bin file"
FINGERPRINT_BYTES = 2**16  # at each end of a file
SHARD_SUFFIX = ".bin"
COMPRESSION_RATIO = 3
"""Bytes of text per byte of a compressed file, about; of Parquet, too, which compresses columns."""
TEXT_PER_SHARD_BYTE = 2
"""Shards of other programs: 4 bytes of text per token of GPT-2, which takes 2 bytes."""


class ProgressBar(Protocol):
    """Shows the progress of a preparation."""

    def start(self, total: int, done: int) -> None:
        """Show the bytes of all files, and those done by an earlier process."""

    def add(self, file_bytes: int, text_bytes: int) -> None:
        """Add bytes of the files, and of their text, that are done."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How to read, split and tokenize texts."""

    tokenizer: str | Tokenizer = "gpt2"  # or its name or file; char and bpe are made from the text
    vocab_size: int = 0  # ids of "bpe"; 0: by the size of the text
    val_fraction: float = 0.1
    text_format: TextFormat = field(default_factory=TextFormat)
    kind: KindFlag = "auto"
    split_by_name: bool = True  # hold out files named validation, ignore those named test
    needs_val: bool = False  # hold out such files even if val_fraction is 0
    raw_bin: bool = False  # shards without a header, one for each split, as nanoGPT writes them

    def request(self, path: Path) -> "PrepareRequest":
        """The request that prepares a file, folder or pattern with these options."""
        options = {option.name: getattr(self, option.name) for option in fields(TextOptions)}
        return PrepareRequest((path.as_posix(),), **options)


@dataclass(frozen=True)
class FileSelection:
    """The files to read, the indices of those held out by name, and notices for the user."""

    sources: list[Source]
    val_sources: tuple[int, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class PrepareRequest(TextOptions):
    """A data set to prepare."""

    names: tuple[str, ...]  # files, folders, patterns and pipes; - is standard input
    shard_bytes: int = 2**26  # bytes of input files per shard
    skip_bad: bool = False
    selection: FileSelection | None = None  # of the files, if it is known already
    cache_key: str = ""  # empty: a hash of the files' names and dates, and the options


def select_files(request: PrepareRequest, *, spool_dir: Path | None = None) -> FileSelection:
    """Select the files that a request reads; `spool_dir` gets the content of pipes."""
    notices: list[str] = []
    sources = find_sources(
        request.names,
        kind=request.kind,
        spool_dir=spool_dir,
        skip_unreadable=request.skip_bad,
        notices=notices,
    )
    val_sources: tuple[int, ...] = ()
    if request.split_by_name:
        paths = [source.path for source in sources]
        words = split_by_name(paths)
        uses_val = request.val_fraction > 0 or request.needs_val
        if notice := describe_filename_splits(paths, words, uses_val=uses_val):
            notices.append(notice)
        ignored = ("test",) if uses_val else ("test", "val")
        selected = [(s, w) for s, w in zip(sources, words, strict=True) if w not in ignored]
        sources = [source for source, _ in selected]
        val_sources = tuple(i for i, (_, word) in enumerate(selected) if word == "val")
    notices += describe_unused_fraction(request, has_named=bool(val_sources))
    notices += _describe_copies(sources, val_sources)
    notices += describe_unused_flags(request, {source.kind for source in sources})
    return FileSelection(sources, val_sources, tuple(notices))


def find_shards(path: Path) -> list[Path]:
    """The token shards that a path names: one, or those in a folder, without hidden ones."""
    is_shard = path.suffix == SHARD_SUFFIX and path.is_file()
    return [path] if is_shard else sorted(path.glob(f"[!.]*{SHARD_SUFFIX}"))


def describe_unused_flags(options: TextOptions, kinds: Collection[FileKind]) -> list[str]:
    """Notices about flags that have no effect on files of these kinds; none for token shards."""
    text_format, default = options.text_format, TextFormat()
    unused = [
        name
        for name, readers in _KINDS_WITH.items()
        if getattr(text_format, name) != getattr(default, name) and not readers.keys() & set(kinds)
    ]
    if not kinds:
        if options.kind != "auto":
            unused.append("kind")
        return [f"--{name} has no effect on token shards" for name in unused]
    return [
        f"--{name} has no effect: no file is {' or '.join(_KINDS_WITH[name].values())}"
        for name in unused
    ]


def describe_unused_fraction(options: TextOptions, *, has_named: bool) -> list[str]:
    """A notice about `--val_fraction` if files are held out by their names instead."""
    if not has_named or options.val_fraction in (0, TextOptions.val_fraction):
        return []
    return ["--val_fraction has no effect: files are held out by their names"]


def fingerprint(path: Path) -> str:
    """16 hexadecimal digits of a hash of a file's size and ends: cheap for a file of any size."""
    return hashlib.sha256(f"{path.stat().st_size}\n".encode() + read_ends(path)).hexdigest()[:16]


def read_ends(path: Path) -> bytes:
    """Return the first and the last 64 KiB of a file; all of it, or twice, if it is shorter."""
    with path.open("rb") as file:
        head = file.read(FINGERPRINT_BYTES)
        file.seek(max(0, path.stat().st_size - FINGERPRINT_BYTES))
        return head + file.read(FINGERPRINT_BYTES)


def _describe_copies(sources: Sequence[Source], val_sources: Sequence[int]) -> list[str]:
    val = {sources[index] for index in val_sources}
    sizes = Counter(source.size for source in sources)
    originals: dict[str, Source] = {}
    copies: list[tuple[Source, Source]] = []
    for source in sources:
        if source.size and sizes[source.size] > 1:
            try:
                digest = files.sha256(source.path)
            except OSError:
                continue  # reported, or skipped, where its text is read
            original = originals.setdefault(digest, source)
            if original is not source:
                copies.append((source, original))
    if not copies:
        return []
    more = f", and so are {len(copies) - 1:,} more files" if len(copies) > 1 else ""
    in_both_splits = any((source in val) != (original in val) for source, original in copies)
    effect = "held-out text is trained on" if in_both_splits else "the text is read again"
    return [f"{copies[0][0].name} is a copy of {copies[0][1].name}{more}: {effect}"]


@dataclass(frozen=True)
class TextSize:
    """Bytes of text to train on, and the tokenizer of shards, which is fixed; else empty."""

    num_bytes: int
    tokenizer_name: str = ""


def estimate_text_size(path: Path, options: TextOptions) -> TextSize:
    """Estimate the bytes of text to train on; exact for plain text and prepared shards.

    A UserError if there are no files, or it is a pipe, which can only be read once.
    """
    if path.is_dir() and (index := read_index(path)) is not None:
        name = str(index.record["tokenizer"]["name"])
        return TextSize(index.total("train", "bytes"), name)
    if shards := find_shards(path):
        indices, val_indices = split_shards(shards)
        num_bytes = sum(shards[i].stat().st_size for i in indices)
        share = 1.0 if val_indices else 1 - options.val_fraction
        return TextSize(round(TEXT_PER_SHARD_BYTE * num_bytes * share), "gpt2")
    selection = select_files(options.request(path))
    train = [s for i, s in enumerate(selection.sources) if i not in set(selection.val_sources)]
    share = 1.0 if selection.val_sources else 1 - options.val_fraction
    return TextSize(round(sum(map(_text_bytes, train)) * share))


def _text_bytes(source: Source) -> int:
    is_compressed = source.compression or source.kind == "parquet"
    return source.size * (COMPRESSION_RATIO if is_compressed else 1)
