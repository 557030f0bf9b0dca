"""One process a folder: two would write over each other's files."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from gptforge import files
from gptforge.errors import UserError

LOCK_FILE = ".lock"
"""The file inside a folder that is locked, there as long as somebody holds the folder."""

GLANCES, PAUSE = 6, 0.02
"""How often a lock is tried that others have, and seconds in between: they may only be looking."""

_TAKEN = (errno.EAGAIN, errno.EACCES, getattr(errno, "EDEADLOCK", errno.EAGAIN))
"""What the systems say when another process has the lock."""


class FolderLock:
    """A folder that other processes keep away from until this is closed or the process ends."""

    def __init__(self, folder: Path, file: IO[str], made: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._file = file
        self._made = made

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let go; folders that were made for the lock go too, if nothing was put there."""
        if self._file.closed:
            return
        _release(self._file, self.folder)
        for place in self._made:
            with contextlib.suppress(OSError):
                place.rmdir()

    def move_to_backup(self, suffix: str) -> Path:
        """Rename the folder as `files.set_aside` does, and hold a new, empty one in its place.

        Raises:
            UserError: if another process was quicker to take that.
        """
        if os.name == "nt":
            # A folder with an open file in it cannot be renamed there.
            _release(self._file, self.folder)
        aside = files.move_to_backup(self.folder, suffix)
        new = lock_folder(self.folder)
        if os.name != "nt":
            _release(self._file, aside)
        if new is None:
            raise UserError(
                f"another process took {self.folder.as_posix()} while the old one was moved to "
                f"{aside.as_posix()}: wait for it, or choose another folder"
            )
        self._file, self._made = new._file, ()
        return aside


class NullLock(FolderLock):
    """What the ranks behind the first have: rank 0 holds the folder."""

    def __init__(self) -> None:
        pass

    def release(self) -> None:
        """Nothing is held."""


def lock_folder(folder: Path, *, wait: bool = False) -> FolderLock | None:
    """Keep other processes away from a folder; where there is none, it is made.

    The lock lies in the folder: it is the same one whatever path leads there, and on a network's
    disk it holds between machines, as far as that knows locks. The operating system lets go of it
    however the process ends.

    Returns:
        None where another process holds it and `wait` is False.

    Raises:
        UserError: if a link or something else that is no file is in the lock's place.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = _open(folder / LOCK_FILE)
        except (FileNotFoundError, FileExistsError):
            # Whoever held it has just deleted the folder behind himself.
            if folder.exists() and not folder.is_dir():
                raise
            continue
        try:
            is_ours = _take(file, wait=wait)
        except OSError:
            # A disk without locks: those on this machine can be kept away all the same.
            file.close()
            file = _open(_elsewhere(folder))
            is_ours = _take(file, wait=wait)
        if is_ours and _is_in_place(file):
            return FolderLock(folder, file, made)
        file.close()
        if not is_ours:
            return None


def _open(lock: Path) -> IO[str]:
    """Open a lock, made if it is not there; never through a link, which could lead anywhere."""
    try:
        return files.open_regular(lock, "a", follow_symlinks=False, encoding="utf-8")
    except files.NonRegularFileError as error:
        raise UserError(f"{error}: delete it") from None


@contextlib.contextmanager
def atomic_create(path: Path, *, log: Callable[[str], None] | None = None) -> Iterator[Path]:
    """A scratch path for a file or folder, which becomes `path` when the block ends well.

    It lies in the folder `.NAME.partial` beside `path`. That is locked meanwhile: processes that
    make the same thing take turns, and the next one deletes what a killed one left.

    Args:
        path: what to make; if the block makes nothing, it stays as it is.
        say: told if another process has to be waited for.
    """
    place = path.with_name(f".{path.name}.partial")
    if place.is_symlink():
        place.unlink()
    held = lock_folder(place)
    if held is None:
        if log is not None:
            log(f"note: waiting for another process that makes {path.as_posix()}")
        held = lock_folder(place, wait=True)
    assert held is not None
    try:
        with held:
            for leftover in place.iterdir():
                if leftover.name != LOCK_FILE:
                    files.remove(leftover)
            scratch = place / f"new{path.suffix}"
            try:
                with files.add_filename_to_errors(path):
                    yield scratch
                    if scratch.exists():
                        scratch.replace(path)
                        files.fsync_dir(path.parent)
            finally:
                files.remove(scratch)
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


@contextlib.contextmanager
def atomic_create_dir(path: Path) -> Iterator[Path]:
    """As `new_path`, for a folder that is not there yet, or empty.

    Raises:
        UserError: if something is there already.
    """
    if path.is_symlink() and path.is_dir():
        path = path.resolve()
    _refuse_existing(path)
    with atomic_create(path) as scratch:
        # Another process may have made it while this one waited.
        _refuse_existing(path)
        scratch.mkdir()
        yield scratch
        if path.is_dir():
            path.rmdir()


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path.as_posix()} is there already: choose another name or remove it")


def is_locked(folder: Path) -> bool:
    """Whether some process, this one or another, holds a folder by the lock that lies in it."""
    try:
        file = files.open_regular(folder / LOCK_FILE, "r+", follow_symlinks=False, encoding="utf-8")
    except OSError:
        return False
    with file:
        try:
            # Two that look at the same time must not take each other for its holder.
            return not _lock(file, wait=False, shared=True)
        except OSError:
            return False


def _take(file: IO[str], *, wait: bool) -> bool:
    """As `_lock`, but not put off by somebody who only looks whether it is held."""
    tries = 1
    while not (is_ours := _lock(file, wait=wait)) and (wait or tries < GLANCES):
        # Windows waits for ten seconds only.
        time.sleep(PAUSE)
        tries += 1
    return is_ours


def _lock(file: IO[str], *, wait: bool, shared: bool = False) -> bool:
    """Whether the lock is ours now; an OSError where there can be none.

    `shared` ones do not keep each other out, except on Windows, which has none.
    """
    try:
        if os.name == "nt":
            import msvcrt

            mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined]
            msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        return False
    return True


def _is_in_place(file: IO[str]) -> bool:
    """Whether a file that is locked by now was not deleted, or moved with its folder, before."""
    if os.name == "nt":
        # Neither can be done to an open file there.
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False


def _release(file: IO[str], folder: Path) -> None:
    """Delete the lock's file while it is still ours, or on Windows just after."""
    if os.name == "nt":
        file.close()
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink()
    file.close()


def _elsewhere(folder: Path) -> Path:
    there = folder.stat()
    return files.private_temp_dir() / f"{there.st_dev}-{there.st_ino}.lock"
