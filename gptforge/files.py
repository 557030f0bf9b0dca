"""File access that survives crashes and hostile files."""

import atexit
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TextIO, cast

from gptforge.printable import is_terminal

MAX_TEXT_BYTES = 16 * 2**20  # ten times the largest text file of a checkpoint, GPT-2's merge list

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


class NonRegularFileError(OSError):
    """A pipe, device, folder or link where a regular file was expected."""

    def __str__(self) -> str:
        return f"{self.filename} is {self.strerror}"


def nonregular_kind(path: Path, *, follow_symlinks: bool = True) -> str:
    """The kind of a file that is not regular, such as "a named pipe"; else an empty string."""
    try:
        mode = path.stat(follow_symlinks=follow_symlinks).st_mode
    except OSError:
        return ""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "")


def open_regular(
    path: Path, mode: str = "rb", *, follow_symlinks: bool = True, **options: Any
) -> IO[Any]:
    """Open a regular file; anything else is a NonRegularFileError, as reading it might never end.

    Links are followed unless the file is inside a run folder, which they must not lead out of.
    """
    if kind := nonregular_kind(path, follow_symlinks=follow_symlinks):
        raise NonRegularFileError(errno.EINVAL, f"{kind}, not a regular file", path.as_posix())

    def opener(name: str, flags: int) -> int:
        # The file may have been replaced since the check above.
        fd = os.open(name, flags | _NO_WAIT | (0 if follow_symlinks else _NO_FOLLOW), 0o666)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise NonRegularFileError(errno.EINVAL, "not a regular file", path.as_posix())
        return fd

    return open(path, mode, opener=opener, **options)


def read_bounded(path: Path, max_bytes: int, *, follow_symlinks: bool = True) -> bytes:
    """Read a regular file; an OSError if it has more than `max_bytes` bytes or is not regular."""
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        # Some system files claim size 0, and others may grow meanwhile.
        data = cast(bytes, file.read(max_bytes + 1))
    _check_size(path, len(data), max_bytes)
    return data


def check_file_size(path: Path, max_bytes: int, *, follow_symlinks: bool = True) -> None:
    """Raise the errors of `read_bounded` for a file that a library will read."""
    with open_regular(path, follow_symlinks=follow_symlinks) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise OSError(f"{path.name} has {size:,} bytes, more than any file of its kind")


def read_text(path: Path, *, follow_symlinks: bool = True) -> str:
    """Read a text file of at most MAX_TEXT_BYTES, without its byte order mark, and with `\\n`."""
    data = read_bounded(path, MAX_TEXT_BYTES, follow_symlinks=follow_symlinks)
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace a file in one step: write a temporary file beside it, fsync, and rename."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path` that is renamed over it if the block succeeds."""
    with add_filename_to_errors(path):
        temporary = create_partial(path)
        try:
            yield temporary
            commit_partial(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def create_partial(path: Path) -> Path:
    """Create an empty temporary file beside `path`, for `commit_partial`."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    # Never write through a link that was planted there.
    remove(temporary)
    temporary.touch(exist_ok=False)
    return temporary


def commit_partial(temporary: Path, path: Path) -> None:
    """Sync a temporary file and rename it over `path`."""
    fsync(temporary)
    temporary.replace(path)
    fsync_dir(path.parent)


@contextmanager
def add_filename_to_errors(path: Path) -> Iterator[None]:
    """Set the file name of an OSError in the body, as failed writes do not carry one."""
    try:
        yield
    except OSError as error:
        if error.errno is None and "requested and" in str(error):
            # numpy's tofile, with which gguf writes, only reports how many items were written.
            error.errno = errno.EFBIG if _has_file_size_limit() else errno.ENOSPC
            error.strerror = os.strerror(error.errno)
        if error.filename is None:
            error.filename = path.as_posix()
        raise


def _has_file_size_limit() -> bool:
    """Whether `ulimit -f` limits the size of files; Windows has no such limit."""
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY


def free_disk_bytes(path: Path) -> int | None:
    """Free bytes on the disk of a path, which need not exist.

    None if they are unknown: ramfs and some network file systems report a size of 0.
    """
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    usage = shutil.disk_usage(existing)
    return usage.free if usage.total else None


def private_temp_dir() -> Path:
    """A folder in the temporary directory that only this user's processes can access.

    If its name is taken, as by a folder of another user, it is a new one that lasts as long as this
    process.
    """
    return _private_dir_in(Path(tempfile.gettempdir()))


@functools.cache
def _private_dir_in(folder: Path) -> Path:
    if sys.platform == "win32":
        # The temporary directory is private to the user.
        path = folder / "gptforge"
        path.mkdir(exist_ok=True)
        return path
    path = folder / f"gptforge-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    is_private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) & 0o077 == 0
    if is_private and status.st_uid == os.getuid():
        return path
    path = Path(tempfile.mkdtemp(prefix="gptforge-", dir=folder))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def fsync(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Flush a folder's entries to disk; Windows neither can nor needs to."""
    if os.name != "nt":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def is_finite_number(value: object) -> bool:
    """Whether a JSON value is a number to compute with: not a bool, NaN or 10**400."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e100


def is_count(value: object) -> bool:
    """Whether a JSON value is a whole number from 0 on that fits into 64 bits."""
    return type(value) is int and 0 <= value < 2**62


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()


def json_line(record: Mapping[str, object]) -> str:
    """Format a JSON object as one line; NaN and infinity become null."""
    finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
    return json.dumps(finite) + "\n"


def set_link(link: Path, target: str) -> None:
    """Point `link` to the sibling folder `target`, in one step.

    It is a relative symbolic link, or a one-line file with the name where the file system has no
    links and on Windows, which cannot rename over a link to a folder.
    """
    temporary = link.with_name(f".{link.name}.partial")
    remove(temporary)
    if os.name != "nt":
        with contextlib.suppress(OSError):
            temporary.symlink_to(target, target_is_directory=True)
    if not os.path.lexists(temporary):
        temporary.write_text(target + "\n", encoding="utf-8")
        fsync(temporary)
    if link.is_dir() and not link.is_symlink():
        # In a copy of a run whose links were followed. A rename cannot replace a folder.
        move_to_backup(link, "old")
    temporary.replace(link)
    fsync_dir(link.parent)


def read_link(link: Path) -> str | None:
    """The name that `set_link` stored, or None."""
    if link.is_symlink():
        return link.readlink().name
    if link.is_file() and link.stat().st_size < 256:
        return read_bounded(link, 256).decode("utf-8", "replace").strip()
    return None


def remove(path: Path) -> None:
    """Delete a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_to_backup(path: Path, suffix: str) -> Path:
    """Rename `path` to the first free of `path.suffix-1`, `-2`, ...; returns the new path."""
    backups = (path.with_name(f"{path.name}.{suffix}-{i}") for i in itertools.count(1))
    # lexists: a dangling link is in the way as well.
    return path.rename(next(backup for backup in backups if not os.path.lexists(backup)))


def real_path(path: str | Path) -> Path:
    """`Path.resolve` that tolerates a loop of links."""
    return Path(os.path.realpath(path))


def redirect_to_devnull(stream: TextIO) -> None:
    """Discard everything written to an open stream from now on, if it has a file descriptor."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(AttributeError, OSError):
        os.dup2(devnull, stream.fileno())
    os.close(devnull)


def discard_terminal_output() -> None:
    """After SIGHUP the terminal is gone, and writing to it would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if is_terminal(stream):
            redirect_to_devnull(stream)


def cache_dir() -> Path:
    """The user's cache folder for this program; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return Path(home or Path.home() / ".cache") / "gptforge"
    except RuntimeError:
        # A container's user may have no home.
        return private_temp_dir()
