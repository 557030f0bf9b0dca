"""Writing files so that a crash leaves the old one or the new one, never half of either; and
opening what others wrote: regular files only, of bounded size, without following links if asked.
"""

import atexit
import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from glob import has_magic
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TextIO, cast

from gptforge import files

MAX_TEXT_BYTES = 16 * 2**20
"""Bytes: ten times the largest text file in a checkpoint, GPT-2's merge list."""


DISK_FULL_ERRNOS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""What the system says when a disk, or the user's share of it, is full."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


class NonRegularFileError(OSError):
    """Something other than a regular file: a pipe, a device, a folder or a link."""

    def __str__(self) -> str:
        return f"{self.filename} is {self.strerror}"


def nonregular_kind(path: Path, *, follow_symlinks: bool = True) -> str:
    """What is there instead of a regular file, such as "a named pipe"; empty if nothing is.

    Args:
        path: where to look.
        follow_symlinks: whether a link counts as what it leads to.
    """
    try:
        mode = path.stat(follow_symlinks=follow_symlinks).st_mode
    except OSError:
        return ""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "")


def open_regular(
    path: Path, mode: str = "rb", *, follow_symlinks: bool = True, **options: Any
) -> IO[Any]:
    """Open a file that others may have written or put there; never waits, as for a pipe's writer.

    Args:
        path: the file.
        mode: as for `open`, for instance "ab".
        follow_symlinks: whether a link may stand for the file. The files inside of a run folder
            are opened without: a run folder from elsewhere must not lead to files outside of it.
        options: more arguments for `open`.

    Raises:
        IrregularFileError: if it is not a regular file.
    """
    if kind := nonregular_kind(path, follow_symlinks=follow_symlinks):
        raise NonRegularFileError(errno.EINVAL, f"{kind}, not a regular file", path.as_posix())

    def opener(name: str, flags: int) -> int:
        # What was looked at may be something else by now.
        handle = os.open(name, flags | _NO_WAITING | (0 if follow_symlinks else _NO_LINKS), 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise NonRegularFileError(errno.EINVAL, "not a regular file", path.as_posix())
        return handle

    return open(path, mode, opener=opener, **options)


def read_bounded(path: Path, max_bytes: int, *, follow_symlinks: bool = True) -> bytes:
    """The bytes of a file that others may have written.

    Raises:
        OSError: if it has more than `most` bytes, or is not a regular file.
    """
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        # Some files of the system say 0, or grow meanwhile.
        data: bytes = file.read(max_bytes + 1)
    _check_size(path, len(data), max_bytes)
    return data


def check_file_size(path: Path, max_bytes: int, *, follow_symlinks: bool = True) -> None:
    """Raise the OSErrors of `read_bounded`, for a file that a library is to read."""
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"{path.name} has {size:,} bytes, more than any file of its kind")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` in one step: written beside it, synced to disk, renamed over it."""
    with atomic_replace(path) as partial:
        partial.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """A scratch file beside `path`; what is written there takes its place when the block ends."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with add_filename_to_errors(path):
            # A link that lies there, in a folder from elsewhere, must not be written through.
            remove(partial)
            partial.touch(exist_ok=False)
            yield partial
            fsync(partial)
            partial.replace(path)
            fsync_dir(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def add_filename_to_errors(path: Path) -> Iterator[None]:
    """Give an error of the disk the name of the file: a write that fails does not know it."""
    try:
        yield
    except OSError as error:
        if error.errno is None and "requested and" in str(error):
            # numpy counts the numbers that found room, and nothing else.
            error.errno, error.strerror = errno.ENOSPC, os.strerror(errno.ENOSPC)
        if error.filename is None:
            error.filename = path.as_posix()
        raise


def free_disk_bytes(path: Path) -> int:
    """Bytes free on the disk where something is or will be; asking makes no folder."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def private_temp_dir() -> Path:
    """A folder in the temporary directory that no other user can write to or read.

    It has the same name for every process of a user. Where something else has that name, for
    example a folder that another user made, a new one is made for this process and deleted when it
    ends.
    """
    return _private_dir_in(Path(tempfile.gettempdir()))


@functools.cache
def _private_dir_in(folder: Path) -> Path:
    if sys.platform == "win32":
        # The temporary directory itself is the user's own there.
        path = folder / "gptforge"
        path.mkdir(exist_ok=True)
        return path
    path = folder / f"gptforge-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    facts = path.lstat()
    is_private = stat.S_ISDIR(facts.st_mode) and stat.S_IMODE(facts.st_mode) & 0o077 == 0
    if is_private and facts.st_uid == os.getuid():
        return path
    other = Path(tempfile.mkdtemp(prefix="gptforge-", dir=folder))
    atexit.register(shutil.rmtree, other, ignore_errors=True)
    return other


def fsync(path: Path) -> None:
    """Have the operating system put a file's bytes on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Put a folder's list of names on the disk. Windows cannot, and needs no such call."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(path: Path, *, follow_symlinks: bool = True) -> str:
    """A text file of our own; an OSError if it is larger than any that we write.

    A stranger's file must not be able to take the memory. A byte order mark, which editors leave,
    is passed over.
    """
    text = read_bounded(path, MAX_TEXT_BYTES, follow_symlinks=follow_symlinks).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_finite_number(value: object) -> bool:
    """Whether a value out of JSON is a number that can be computed with: no NaN, no 10**400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e100


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def json_line(record: Mapping[str, object]) -> str:
    """One JSON object as a line. NaN and infinity, which JSON lacks, become null."""
    finite = {name: _finite(value) for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    is_bad = isinstance(value, float) and (value != value or value in (float("inf"), -float("inf")))
    return None if is_bad else value


def set_link(link: Path, target: str) -> None:
    """Make `link` lead to the sibling folder `target`, in one step.

    A relative symbolic link; a one-line file with the name where the file system refuses links,
    and on Windows, which cannot rename over a link to a folder.
    """
    partial = link.with_name(f".{link.name}.partial")
    remove(partial)
    try:
        if os.name == "nt":
            raise OSError("no links here")
        partial.symlink_to(target, target_is_directory=True)
    except OSError:
        partial.write_text(target + "\n", encoding="utf-8")
        fsync(partial)
    if link.is_dir() and not link.is_symlink():
        # A copy of the run whose links were followed: nothing renames over a folder.
        move_to_backup(link, "old")
    partial.replace(link)
    fsync_dir(link.parent)


def read_link(link: Path) -> str | None:
    """The name that `point` stored, or None where there is none that can be read."""
    if link.is_symlink():
        return link.readlink().name
    if link.is_file() and link.stat().st_size < 256:
        return read_bounded(link, 256).decode("utf-8", "replace").strip()
    return None


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_to_backup(path: Path, suffix: str) -> Path:
    """Rename `path` to the first free of `path.suffix-1`, `-2`, ...; returns the new name."""
    number = 1
    # A link that leads nowhere is in the way as well.
    while os.path.lexists(aside := path.with_name(f"{path.name}.{suffix}-{number}")):
        number += 1
    path.rename(aside)
    return aside


def is_inside(folder: Path, name: str) -> bool:
    """Whether a path, or any file that it stands for as a pattern, lies in a folder."""
    there = real_path(folder)
    return any(real_path(one).is_relative_to(there) for one in [Path(name), *expand_glob(name)])


def real_path(path: str | Path) -> Path:
    """`Path.resolve`, but for a loop of links, where that raises a RuntimeError."""
    return Path(os.path.realpath(path))


def expand_glob(pattern: str) -> list[Path]:
    """The paths that a pattern with `*`, `?`, `[]` and `**` stands for, sorted.

    A part of it that exists as it is written is no pattern. Hidden names match only where the
    pattern has the dot, and `**` goes into each folder once, however many links lead there.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    return sorted(set(_expand(Path(path.anchor), parts)), key=str)


def _expand(base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield base
        return
    first, rest = parts[0], parts[1:]
    if parts[:2] == ("**", "**"):
        yield from _expand(base, rest)
    elif first == "**":
        for folder in _folders_below(base):
            yield from _expand(folder, rest or ("*",))
    elif os.path.lexists(base / first):
        yield from _expand(base / first, rest)
    elif has_magic(first):
        for name in fnmatch.filter(_names_in(base), first):
            is_left_out = name.startswith(".") and not first.startswith(".")
            if not is_left_out and (not rest or (base / name).is_dir()):
                yield from _expand(base / name, rest)


def _names_in(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _folders_below(base: Path) -> Iterator[Path]:
    """A folder and all in it, each once: those that links lead to come last."""
    waiting, seen = [base], set[tuple[int, int]]()
    for start in waiting:
        for place, folders, _ in os.walk(start):
            here = Path(place)
            facts = here.stat()
            if (facts.st_dev, facts.st_ino) in seen:
                folders.clear()
                continue
            seen.add((facts.st_dev, facts.st_ino))
            yield here
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [here / name for name in folders if (here / name).is_symlink()]


def redirect_to_devnull(stream: TextIO) -> None:
    """Have what is written to an open stream, by whomever, go nowhere from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def cache_dir() -> Path:
    """Where this user's programs keep what can be found out again."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(home or Path.home() / ".cache") / "gptforge"
    except RuntimeError:
        # A container's user may have no home.
        return files.private_temp_dir()
