"""Folder locks, and creating files and folders that appear complete or not at all."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptforge import files
from gptforge.errors import UserError

if TYPE_CHECKING:
    from filelock import BaseFileLock


LOCK_FILE = ".lock"  # the lock file inside a locked folder

RETRY_SECONDS, POLL_SECONDS = 0.12, 0.02
"""How long and how often a lock is tried: `is_locked` elsewhere takes it for an instant."""
MAX_ATTEMPTS = 100
"""Attempts to create a folder, which its previous owner may remove just then."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class FolderLock(contextlib.AbstractContextManager["FolderLock"]):
    """A locked folder. The operating system drops the lock however the process ends."""

    def __init__(self, folder: Path, lock: "BaseFileLock", created: Sequence[Path] = ()) -> None:
        self.folder = folder.absolute()
        self._lock = lock
        self._created = [path.absolute() for path in created]

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Unlock, and remove the lock file and the folders made for it that are still empty."""
        if not self._lock.is_locked:
            return
        _release(self._lock, self.folder)
        for folder in self._created:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def move_to_backup(self, suffix: str) -> Path:
        """Rename the folder as `files.move_to_backup` does, and lock a new, empty one in its place.

        Raises:
            UserError: if another process locks the new folder first.
        """
        if os.name == "nt":
            # Windows cannot rename a folder that holds an open file.
            _release(self._lock, self.folder)
        backup = files.move_to_backup(self.folder, suffix)
        new = lock_folder(self.folder)
        if os.name != "nt":
            _release(self._lock, backup)
        if new is None:
            raise UserError(
                f"another process locked {self.folder.as_posix()} while the old one was moved to "
                f"{backup.as_posix()}: wait for it, or choose another folder"
            )
        self._lock, self._created = new._lock, []
        return backup


def lock_folder(folder: Path, *, wait: bool = False) -> FolderLock | None:
    """Lock a folder, which is created if needed.

    The lock file lies in the folder, so every path to it leads to the same lock, and on a network
    file system it holds between machines where that supports locks.

    Returns:
        None if another process holds the lock and `wait` is False.

    Raises:
        UserError: if the folder cannot be created, or the lock file is not a regular file.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    reason: str | None = None
    for _ in range(MAX_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _acquire(folder, wait=wait)
        except (FileNotFoundError, FileExistsError) as error:
            if folder.exists() and not folder.is_dir():
                raise
            reason = error.strerror  # or its previous owner has just removed it: try again
        else:
            return None if lock is None else FolderLock(folder, lock, created)
    # The folder of a device or of a process (/proc), or a dangling link.
    raise UserError(f"{folder.as_posix()} cannot be created ({reason}): choose another folder")


def is_locked(folder: Path) -> bool:
    """Whether any process, including this one, holds the lock of a folder."""
    if not (folder / LOCK_FILE).is_file():
        return False
    try:
        lock = _acquire(folder, wait=False)
    except (OSError, UserError):
        return False
    if lock is not None:
        lock.release()
    return lock is None


@contextlib.contextmanager
def atomic_create(
    path: Path, *, is_new: bool = False, log: Callable[[str], None] | None = None
) -> Iterator[Path]:
    """Yield a scratch path for a file or folder that is renamed to `path` if the block succeeds.

    The scratch path lies in `.NAME.partial` beside `path`. That folder is locked meanwhile, so
    processes that create the same path take turns, and leftovers of a killed one are deleted.

    Args:
        path: what to create; stays as it is if the block creates nothing.
        is_new: raise a UserError if `path` exists, unless it is an empty folder.
        log: called if another process has to be waited for.
    """
    if is_new:
        _check_absent(path)
    workspace = path.with_name(f".{path.name}.partial")
    if workspace.is_symlink():
        workspace.unlink()
    lock = lock_folder(workspace)
    if lock is None:
        if log is not None:
            log(f"note: waiting for another process that is creating {path.as_posix()}")
        lock = lock_folder(workspace, wait=True)
    assert lock is not None
    try:
        with lock:
            for leftover in workspace.iterdir():
                if leftover.name != LOCK_FILE:
                    files.remove(leftover)
            if is_new:  # another process may have created it while this one waited
                _check_absent(path)
            scratch = workspace / f"new{path.suffix}"
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
            workspace.rmdir()


@contextlib.contextmanager
def atomic_create_dir(path: Path) -> Iterator[Path]:
    """`atomic_create` for a folder that does not exist yet or is empty."""
    if path.is_symlink() and path.is_dir():
        path = path.resolve()
    with atomic_create(path, is_new=True) as scratch:
        scratch.mkdir()
        yield scratch
        if path.is_dir():
            path.rmdir()


def _check_absent(path: Path) -> None:
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path.as_posix()} already exists: choose another name or remove it")


def _acquire(folder: Path, *, wait: bool) -> "BaseFileLock | None":
    from filelock import FileLock, Timeout  # loads in 60 ms

    path = folder / LOCK_FILE
    if kind := files.nonregular_kind(path, follow_symlinks=False):
        raise UserError(f"{path.as_posix()} is {kind}, not a regular file: delete it")
    timeout = -1 if wait else RETRY_SECONDS
    try:
        lock = FileLock(path, thread_local=False, preserve_lock_file=True)
        try:
            lock.acquire(timeout, POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # A file system without locks: at least processes on this machine exclude each other.
            stat = folder.stat()
            path = files.private_temp_dir() / f"{stat.st_dev}-{stat.st_ino}.lock"
            lock = FileLock(path, thread_local=False, preserve_lock_file=True)
            lock.acquire(timeout, POLL_SECONDS)
    except Timeout:
        return None
    return lock


def _release(lock: "BaseFileLock", folder: Path) -> None:
    # The lock file is deleted while it is locked: a process that waits for it then finds it gone
    # and starts again. Windows deletes no open file.
    if os.name == "nt":
        lock.release()
    with contextlib.suppress(OSError):
        (folder / LOCK_FILE).unlink()
    lock.release()
