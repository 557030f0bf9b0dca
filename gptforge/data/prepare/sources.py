"""What there is to read: files, folders and patterns, each with its form and packing."""

import glob
import os
import select
import shutil
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from gptforge import files
from gptforge.errors import UserError
from gptforge.shell import quote

PIPE_TIMEOUT = 10.0
"""Seconds after which a pipe that no program has opened for writing is given up."""


def is_pipe(path: Path) -> bool:
    """Whether a path is a named pipe, or what a shell makes of `<(command)`."""
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def spool(source: Path | None, path: Path) -> None:
    """Write all that comes out of a pipe, or of standard input if it is None, to a file.

    Raises:
        UserError: if nobody writes to the pipe.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_replace(path) as partial, partial.open("wb") as file:
        if source is None:
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        else:
            _copy_pipe(source, file)


def _copy_pipe(source: Path, file: IO[bytes]) -> None:
    # Opened in the usual way, it would block until somebody opens the other end.
    descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    had_writer = False
    with open(descriptor, "rb", buffering=0) as pipe:  # noqa: PTH123 (it is a descriptor)
        while True:
            block = pipe.read(2**20)
            if block:
                file.write(block)
                had_writer = True
            elif block is None:
                had_writer = True
                select.select([pipe], [], [])
            elif had_writer:
                return
            elif select.select([pipe], [], [], PIPE_TIMEOUT)[0]:
                had_writer = True
            else:
                raise UserError(
                    f"{source.as_posix()}: no program has written to this pipe in {PIPE_TIMEOUT:g} s: "
                    "start the one that should, or give a file"
                )


FileKind = Literal["text", "jsonl", "parquet", "csv"]
Compression = Literal["", "gz", "zst", "xz"]

KIND_BY_SUFFIX: dict[str, FileKind] = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".tsv"), "csv"),
}
"""What endings say. A file that is named may have any other: it is text then."""
FOLDER_SUFFIXES = tuple(
    ending for ending in KIND_BY_SUFFIX if ending not in (".json", ".csv", ".tsv")
)
"""Endings that are looked for in a folder. Many a .json there is a program's, and many a .csv is
full of numbers: neither is text."""
COMPRESSION_BY_SUFFIX: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".xz": "xz"}
COMPRESSION_BY_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\xfd7zXZ": "xz",
}
STDIN_FILE = "stdin"
"""What standard input is kept as: it must be read twice."""


@dataclass(frozen=True)
class Source:
    """One file."""

    path: Path
    kind: FileKind
    compression: Compression
    size: int
    """Bytes on the disk."""
    stamp: str
    """Changes when the content does: time of the last change, or a hash."""
    name: str
    """As it is written in messages."""


def find_sources(
    names: Sequence[str],
    *,
    kind: FileKind | Literal["auto"] = "auto",
    spool_dir: Path | None = None,
) -> list[Source]:
    """The files behind the names, in the order given; a folder's and a pattern's by name.

    Args:
        names: files, folders, patterns with * ? or [], and - for standard input.
        kind: what they hold; auto goes by each one's name.
        spool_folder: where the content of standard input and of pipes is kept.

    Raises:
        UserError: for a name with nothing behind it, or a file that is named twice.
    """
    found: list[Source] = []
    for name in names:
        if name == "-" or is_pipe(Path(name)):
            if spool_dir is None:
                what = "standard input" if name == "-" else "a pipe"
                raise UserError(f"{name}: {what} cannot be read here: give a file")
            # A second pipe must not replace the first.
            path = spool_dir / (STDIN_FILE if name == "-" else f"{STDIN_FILE}-{len(found)}")
            found.append(_spooled(name, path, kind))
            continue
        found += [_source(path, kind) for path in _files(name)]
    seen: set[Path] = set()
    for source in found:
        place = files.real_path(source.path)
        if place in seen:
            raise UserError(f"{source.name} is named twice: leave one out")
        seen.add(place)
    return found


@contextmanager
def open_sources(
    names: Sequence[str], *, kind: FileKind | Literal["auto"] = "auto"
) -> Iterator[list[Source]]:
    """As `find_sources`; what came out of pipes and standard input is kept for this block."""
    with tempfile.TemporaryDirectory(prefix="gptforge-") as place:
        yield find_sources(names, kind=kind, spool_dir=Path(place))


def _files(name: str) -> list[Path]:
    path = Path(name)
    if name.startswith(("http:/", "https:/")):
        raise UserError(f"{name}: addresses are not read: download it, and name the file")
    if path.is_dir() and (_is_a_runs(path) or _is_a_models(path)):
        raise UserError(
            f"{name}: the folder of a run or a model, whose files are no text to learn from: "
            f"--init_from {quote(name)} begins with its weights"
        )
    if path.is_dir():
        inside = sorted(_texts_in(path), key=lambda file: file.as_posix())
        if not inside:
            raise UserError(
                f"{name}: no text in this folder: nothing in it ends in {', '.join(FOLDER_SUFFIXES)} or one "
                "of these with .gz, .zst or .xz; name a .json, a .csv or any other file to read it"
            )
        return inside
    if path.exists():
        return [path]
    inside = [path for path in files.expand_glob(name) if path.is_file()]
    if not inside:
        what = "nothing matches this pattern" if glob.has_magic(name) else "there is no such file"
        raise UserError(f"{name}: {what}")
    return inside


def count_ignored_files(name: str) -> Counter[str]:
    """How many files of a folder are not read, by suffix."""
    folder = Path(name)
    if name == "-" or not folder.is_dir():
        return Counter()
    unread = (path for path in _files_in(folder) if _endings(path)[0] not in FOLDER_SUFFIXES)
    return Counter(path.suffix.lower() or "without" for path in unread)


def _texts_in(folder: Path) -> Iterator[Path]:
    return (path for path in _files_in(folder) if _endings(path)[0] in FOLDER_SUFFIXES)


def _files_in(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = [n for n in folders if not n.startswith(".") and not _is_a_runs(here / n)]
        for path in (here / name for name in names if not name.startswith(".")):
            if path.is_file():
                yield path


def _is_a_runs(folder: Path) -> bool:
    """Whether a run writes there: its log and its samples are no text to learn, and they grow."""
    return (folder / "checkpoints").is_dir() and (folder / "config.toml").is_file()


def _is_a_models(folder: Path) -> bool:
    """Whether a model lies there: its card is no text to learn either."""
    return any(folder.glob("*.safetensors")) and any(folder.glob("config.*"))


def _endings(path: Path) -> tuple[str, Compression]:
    packing = COMPRESSION_BY_SUFFIX.get(path.suffix.lower(), "")
    ending = Path(path.stem).suffix if packing else path.suffix
    return ending.lower(), packing


def _source(path: Path, kind: FileKind | Literal["auto"]) -> Source:
    ending, packing = _endings(path)
    chosen = KIND_BY_SUFFIX.get(ending, "text") if kind == "auto" else kind
    if chosen == "parquet" and packing:
        raise UserError(f"{path.as_posix()}: unpack it first: Parquet is read from its end")
    try:
        facts = path.stat()
        name = path.as_posix()
        if not stat.S_ISREG(facts.st_mode):
            what = files.nonregular_kind(path)
            raise UserError(f"{name} is {what}, not a regular file: give a file of text")
        return Source(path, chosen, packing, facts.st_size, str(facts.st_mtime_ns), name)
    except OSError as error:
        raise UserError(f"{path.as_posix()}: cannot be read: {error.strerror}") from None


def _spooled(name: str, path: Path, kind: FileKind | Literal["auto"]) -> Source:
    """Standard input or a pipe as a file; what it is packed with shows in its first bytes."""
    if kind == "parquet":
        raise UserError(f"{name}: Parquet is read from its end: give a file")
    spool(None if name == "-" else Path(name), path)
    with path.open("rb") as file:
        head = file.read(5)
    packing: Compression = next(
        (p for magic, p in COMPRESSION_BY_MAGIC.items() if head.startswith(magic)), ""
    )
    form: FileKind = "text" if kind == "auto" else kind
    shown = "standard input" if name == "-" else name
    return Source(path, form, packing, path.stat().st_size, files.sha256(path), shown)
