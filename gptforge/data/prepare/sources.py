"""Find the input files: from files, folders, patterns, pipes and standard input."""

import glob
import os
import select
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from gptforge import files
from gptforge.errors import UserError, explain_os_error
from gptforge.patterns import expand_glob
from gptforge.printable import pluralize, printable
from gptforge.shell import quote

FileKind = Literal["text", "jsonl", "parquet", "csv"]
KindFlag = FileKind | Literal["auto"]  # auto: by the suffix of each file
Compression = Literal["", "gz", "zst", "xz"]

KIND_BY_SUFFIX: dict[str, FileKind] = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
}
"""Files with other suffixes are read as text if they are named explicitly."""
FOLDER_SUFFIXES = tuple(s for s in KIND_BY_SUFFIX if s not in (".json", ".csv", ".tsv"))
"""Suffixes that are read from a folder. Many .json files there are settings, many .csv numbers."""
COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
COMPRESSION_BY_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\xfd7zXZ": "xz",
}
STDIN_FILE = "stdin"  # in the spool folder
MAX_SUFFIXES = 5  # suffixes of ignored files that are listed
PIPE_TIMEOUT = 10.0  # seconds to wait for a program that writes to a pipe


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: FileKind
    compression: Compression
    status: os.stat_result
    stamp: str  # changes with the content: the modification time, or a hash
    name: str  # for messages

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.status.st_size

    def check_unchanged(self, status: os.stat_result) -> None:
        """Raise a UserError if the file has changed since it was found: it is read repeatedly."""
        found = self.status
        if (found.st_size, found.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            hint = "run the same command again when nothing writes to it"
            raise UserError(f"{self.name} changed while it was read: {hint}")


def find_sources(
    names: Sequence[str],
    *,
    kind: KindFlag = "auto",
    spool_dir: Path | None = None,
    skip_unreadable: bool = False,
    notices: list[str] | None = None,
) -> list[Source]:
    """Expand names to files, in the order given; those of a folder or pattern are sorted.

    Args:
        names: files, folders, patterns with * ? or [], and - for standard input.
        kind: of all files.
        spool_dir: folder for copies of standard input and pipes, since files are read twice.
        skip_unreadable: skip files and folders in a folder that the system does not allow to look
            at.
        notices: gets what was skipped, and which other files of a folder are not read.

    Raises:
        UserError: if a name matches nothing, or a file is named twice.
    """
    sources: list[Source] = []
    notices = [] if notices is None else notices

    def on_error(error: OSError) -> None:
        if not skip_unreadable:
            raise error
        notices.append(f"skipped {error.filename}: {explain_os_error(error)[0]}")

    for name in names:
        if name == "-" or is_pipe(Path(name)):
            if spool_dir is None:
                what, hint = "a pipe", "give a file"
                if name == "-":
                    what, hint = "standard input", "give a file, or /dev/stdin"
                raise UserError(f"{name}: {what} cannot be read here: {hint}")
            # One copy per pipe.
            path = spool_dir / (STDIN_FILE if name == "-" else f"{STDIN_FILE}-{len(sources)}")
            sources.append(_spooled_source(name, path, kind))
        else:
            sources += [_file_source(path, kind) for path in _expand(name, on_error, notices)]
    by_path: dict[Path, Source] = {}
    for source in sources:
        if by_path.setdefault(files.real_path(source.path), source) is not source:
            raise UserError(f"{source.name} is named twice: leave one out")
    return sources


@contextmanager
def open_sources(names: Sequence[str], **options: Any) -> Iterator[list[Source]]:
    """`find_sources` with a temporary spool folder."""
    with tempfile.TemporaryDirectory(prefix="gptforge-") as spool_dir:
        yield find_sources(names, spool_dir=Path(spool_dir), **options)


def _describe_ignored(counts: Counter[str], name: str) -> str:
    listed = [f"{count:,} {suffix}" for suffix, count in counts.most_common(MAX_SUFFIXES)]
    if others := sum(count for _, count in counts.most_common()[MAX_SUFFIXES:]):
        listed.append(f"{others:,} others")
    subject = pluralize(counts.total(), "file is", "files are")
    return f"{subject} ignored in {name}, by suffix: {', '.join(listed)}"


def _expand(name: str, on_error: Callable[[OSError], None], notices: list[str]) -> list[Path]:
    path = Path(name)
    if not name:
        raise UserError(
            "an empty name was given: name a file, a folder (. is this one) or a pattern"
        )
    if name.startswith(("http:/", "https:/")):
        raise UserError(f"{name}: URLs are not supported: download it, and name the file")
    if path.is_dir():
        if _is_run(path) or _is_model(path):
            problem = "the folder of a run or a model, whose files are not training text"
            raise UserError(f"{name}: {problem}: --init_from {quote(name)} starts from its weights")
        reasons = {file: _ignored_as(file) for file in _walk(path, on_error)}
        found = [file for file, reason in reasons.items() if not reason]
        if not found:
            suffixes = f"{', '.join(FOLDER_SUFFIXES)} or one of these with .gz, .zst or .xz"
            problem = f"no text in this folder: nothing in it ends in {suffixes}"
            raise UserError(f"{name}: {problem}; name a .json, a .csv or any other file to read it")
        if ignored := Counter(filter(None, reasons.values())):
            notices.append(_describe_ignored(ignored, name))
        return sorted(found, key=lambda file: file.as_posix())
    if path.exists():
        return [path]
    matches = expand_glob(name)
    found = [file for file in matches if file.is_file()]
    if not found:
        what = "nothing matches this pattern" if glob.has_magic(name) else "there is no such file"
        if path.is_symlink():
            what = "a broken link: correct it"
        elif matches:
            what = "only folders match this pattern: name one of them, or add /* for their files"
        raise UserError(f"{name}: {what}")
    return found


def _walk(folder: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    """Files and links below a folder, without hidden ones and those of runs. Links to folders are
    not entered."""
    for root, folders, names in os.walk(folder, onerror=on_error):
        here = Path(root)
        # Skip runs: their logs and samples are not training text, and change during training.
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_run(here / n)]
        for path in (here / name for name in (*names, *folders) if not name.startswith(".")):
            try:
                is_listed = path.is_file() or path.is_symlink()
            except OSError as error:  # the folder may be listed, but not entered
                on_error(error)
                continue
            if is_listed:
                yield path


def _ignored_as(path: Path) -> str:
    """The suffix of a file of `_walk` that is not read, or what else it is; empty for texts."""
    if not path.is_file():
        return "link to a folder" if path.is_dir() else "broken link"
    is_text = _suffixes(path)[0] in FOLDER_SUFFIXES
    return "" if is_text else path.suffix.lower() or "without"


def _is_run(folder: Path) -> bool:
    with suppress(PermissionError):  # reported when its files are listed
        # Before its first save, a run has logs and no checkpoints.
        is_started = (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").is_file()
        return is_started and (folder / "config.toml").is_file()
    return False


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) and any(folder.glob("config.*"))


def _suffixes(path: Path) -> tuple[str, Compression]:
    compression = COMPRESSION_BY_SUFFIX.get(path.suffix.lower(), "")
    suffix = Path(path.stem).suffix if compression else path.suffix
    return suffix.lower(), compression


def _file_source(path: Path, kind: KindFlag) -> Source:
    name = printable(path.as_posix())  # it need not be UTF-8, and the index lists it
    suffix, compression = _suffixes(path)
    file_kind = KIND_BY_SUFFIX.get(suffix, "text") if kind == "auto" else kind
    if file_kind == "parquet" and compression:
        raise UserError(f"{name}: decompress it first: reading Parquet needs random access")
    if what := files.nonregular_kind(path):
        raise UserError(f"{name} is {what}, not a regular file: give a text file")
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    return Source(path, file_kind, compression, status, str(status.st_mtime_ns), name)


def _spooled_source(name: str, path: Path, kind: KindFlag) -> Source:
    """Copy standard input or a pipe to a file; its magic number gives the compression."""
    if kind == "parquet":
        raise UserError(f"{name}: reading Parquet needs random access: give a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_replace(path) as partial, partial.open("wb") as file:
        if name == "-":
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        else:
            _copy_pipe(Path(name), file)
    with path.open("rb") as file:
        head = file.read(5)
    found = [c for magic, c in COMPRESSION_BY_MAGIC.items() if head.startswith(magic)]
    compression: Compression = found[0] if found else ""
    file_kind: FileKind = "text" if kind == "auto" else kind
    shown = "standard input" if name == "-" else name
    return Source(path, file_kind, compression, path.stat(), files.sha256(path), shown)


def is_pipe(path: Path) -> bool:
    """Whether a path is a named pipe, or a shell's `<(command)`."""
    return files.nonregular_kind(path) == "a named pipe"


def _copy_pipe(source: Path, file: IO[bytes]) -> None:
    # Without O_NONBLOCK, opening it would block until another program opens the other end.
    descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb", buffering=0) as pipe:  # noqa: PTH123 (a descriptor)
        block = pipe.read(2**20)  # None if there is a writer, but no data yet
        if block == b"" and not select.select([pipe], [], [], PIPE_TIMEOUT)[0]:
            problem = f"no program has written to this pipe in {PIPE_TIMEOUT:g} s"
            hint = "start the one that should, or give a file"
            raise UserError(f"{source.as_posix()}: {problem}: {hint}")
        os.set_blocking(descriptor, True)
        file.write(block or b"")
        shutil.copyfileobj(pipe, file, 2**20)
