import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gptforge import lock
from gptforge.errors import UserError
from gptforge.lock import (
    LOCK_FILE,
    atomic_create,
    atomic_create_dir,
    is_locked,
    lock_folder,
)

needs_links = pytest.mark.skipif(os.name == "nt", reason="Windows restricts symbolic links")


@needs_links
def test_lock_holds_for_every_path_to_the_folder(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "parent").symlink_to(tmp_path)
    with lock_folder(tmp_path / "run"):
        for path in ("run", "link", "parent/run", "parent/parent/link", "run/../run"):
            assert lock_folder(tmp_path / path) is None, path
    with lock_folder(tmp_path / "link"):
        assert lock_folder(tmp_path / "run") is None


def test_lock_holds_whatever_the_temporary_directory_is(tmp_path, monkeypatch) -> None:
    with lock_folder(tmp_path / "run"):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        assert lock_folder(tmp_path / "run") is None


def test_release_removes_what_was_made_for_the_lock(tmp_path) -> None:
    lock_folder(tmp_path / "runs/one").release()
    assert not any(tmp_path.iterdir())
    with lock_folder(tmp_path / "runs/one") as held:
        (tmp_path / "runs/one/log.md").write_text("mine")
    held.release()
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["log.md"]


def test_killed_process_leaves_no_lock(tmp_path) -> None:
    code = (
        "import os, pathlib, signal; from gptforge.lock import lock_folder\n"
        f"held = lock_folder(pathlib.Path({str(tmp_path)!r}))\n"
        "os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert (tmp_path / LOCK_FILE).exists()
    assert not is_locked(tmp_path)
    lock_folder(tmp_path).release()
    assert not any(tmp_path.iterdir())


def test_backup_leaves_a_new_locked_folder(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.md").write_text("old")
    with lock_folder(run) as held:
        backup = held.move_to_backup("old")
        assert [path.name for path in backup.iterdir()] == ["log.md"]
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]
        assert lock_folder(run) is None
        lock_folder(backup).release()
    lock_folder(run).release()


def test_waiter_locks_the_new_file_after_the_old_one_is_deleted(tmp_path) -> None:
    first, waited = lock_folder(tmp_path), []
    thread = threading.Thread(target=lambda: waited.append(lock_folder(tmp_path, wait=True)))
    thread.start()
    time.sleep(0.05)
    assert not waited
    first.release()
    thread.join(120)
    assert lock_folder(tmp_path) is None
    waited[0].release()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_file_system_without_locks_still_locks_on_this_machine(tmp_path, monkeypatch) -> None:
    import fcntl

    flock = fcntl.flock

    def refuse(fd: int, how: int) -> None:
        path = tmp_path / "run" / LOCK_FILE
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            raise OSError(errno.ENOLCK, "no locks available")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with lock_folder(tmp_path / "run"):
        assert lock_folder(tmp_path / "run") is None
    lock_folder(tmp_path / "run").release()


def test_checking_a_lock_takes_and_deletes_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "RETRY_SECONDS", 120)
    (tmp_path / LOCK_FILE).touch()
    checking = lock._acquire(tmp_path, wait=False)
    threading.Timer(0.1, checking.release).start()
    with lock_folder(tmp_path):
        monkeypatch.setattr(lock, "RETRY_SECONDS", 0)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    (tmp_path / LOCK_FILE).write_text("of another program")
    assert not is_locked(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == "of another program"


@needs_links
def test_lock_file_that_is_a_link_is_refused(tmp_path) -> None:
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(UserError, match="is a symbolic link"):
        lock_folder(tmp_path)


def test_leftovers_of_a_killed_process_are_deleted(tmp_path) -> None:
    leftover = tmp_path / ".model.partial"
    (leftover / "new").mkdir(parents=True)
    (leftover / "new" / "model.safetensors").write_text("half")
    (leftover / LOCK_FILE).touch()
    with atomic_create_dir(tmp_path / "model") as folder:
        assert not any(folder.iterdir())
        (folder / "file").write_text("complete")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "complete"


def test_failed_creation_leaves_nothing_and_keeps_what_exists(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_create_dir(tmp_path / "deep" / "model") as folder:
        (folder / "file").touch()
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(UserError, match="already exists"), atomic_create_dir(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "mine").exists()


@needs_links
def test_link_to_an_empty_folder_is_followed(tmp_path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    (tmp_path / ".big.partial").symlink_to(tmp_path)
    with atomic_create_dir(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "file").exists()


def test_threads_that_create_the_same_path_take_turns(tmp_path) -> None:
    made, logged = [], []

    def make() -> None:
        with atomic_create(tmp_path / "model", log=logged.append) as scratch:
            if not (tmp_path / "model").exists():
                scratch.write_text("complete")
                made.append(1)

    threads = [threading.Thread(target=make) for _ in range(8)]
    with lock_folder(tmp_path / ".model.partial"):
        for thread in threads:
            thread.start()
        while len(logged) < len(threads):
            time.sleep(0.01)
        assert not made
    for thread in threads:
        thread.join()
    assert made == [1]
    assert (tmp_path / "model").read_text() == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_links
def test_a_folder_that_cannot_be_created_is_an_error_and_not_tried_forever(tmp_path) -> None:
    (tmp_path / "dangling").symlink_to("missing/deeper")
    with pytest.raises(UserError, match=r"dangling cannot be created .*: choose another folder"):
        lock_folder(tmp_path / "dangling")
    with pytest.raises(UserError, match="cannot be created"):
        atomic_create(tmp_path / "dangling/model").__enter__()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="Linux only")
def test_a_file_system_that_takes_no_folders_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match="/proc/gptforge cannot be created"):
        lock_folder(Path("/proc/gptforge"))
