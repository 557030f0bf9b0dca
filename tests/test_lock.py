import errno
import os
import tempfile
import threading
import time

import pytest

from gptforge import lock
from gptforge.errors import UserError
from gptforge.lock import (
    LOCK_FILE,
    atomic_create,
    atomic_create_dir,
    lock_folder,
)

links = pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")


@links
def test_a_folder_is_held_whatever_path_leads_to_it(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "parent").symlink_to(tmp_path)
    with lock_folder(tmp_path / "run"):
        for path in ("run", "link", "parent/run", "parent/parent/link", "run/../run"):
            assert lock_folder(tmp_path / path) is None, path
    with lock_folder(tmp_path / "link"):
        assert lock_folder(tmp_path / "run") is None


def test_a_folder_is_held_whatever_the_temporary_folder_is(tmp_path, monkeypatch) -> None:
    with lock_folder(tmp_path / "run"):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        assert lock_folder(tmp_path / "run") is None


def test_letting_go_leaves_nothing_that_was_made_for_the_lock(tmp_path) -> None:
    lock_folder(tmp_path / "runs/one").release()
    assert not any(tmp_path.iterdir())
    with lock_folder(tmp_path / "runs/one") as held:
        (tmp_path / "runs/one/log.md").write_text("mine")
    held.release()
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["log.md"]


def test_a_folder_that_is_set_aside_leaves_a_new_one_held(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.md").write_text("old")
    with lock_folder(run) as held:
        aside = held.move_to_backup("old")
        assert [path.name for path in aside.iterdir()] == ["log.md"]
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]
        assert lock_folder(run) is None
        lock_folder(aside).release()
    lock_folder(run).release()


def test_who_waited_for_a_folder_keeps_others_away_from_it(tmp_path) -> None:
    first, waited = lock_folder(tmp_path), []
    thread = threading.Thread(target=lambda: waited.append(lock_folder(tmp_path, wait=True)))
    thread.start()
    time.sleep(0.05)
    assert not waited
    first.release()
    thread.join(30)
    # The file that it waited for was deleted: it must have the lock of the one that is there.
    assert lock_folder(tmp_path) is None
    waited[0].release()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_on_a_disk_without_locks_this_machine_is_kept_away(tmp_path, monkeypatch) -> None:
    import fcntl

    real = fcntl.flock

    def refuse(file, how) -> None:
        if file.name == str(tmp_path / "run" / LOCK_FILE):
            raise OSError(errno.ENOLCK, "no locks available")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with lock_folder(tmp_path / "run"):
        assert lock_folder(tmp_path / "run") is None
    lock_folder(tmp_path / "run").release()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no shared locks")
def test_who_looks_whether_a_folder_is_held_keeps_nobody_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "PAUSE", 0.2)
    (tmp_path / LOCK_FILE).touch()
    looker = (tmp_path / LOCK_FILE).open("r+")
    assert lock._lock(looker, wait=False, shared=True)
    assert not lock.is_locked(tmp_path), "by another one who looks"
    leaving = threading.Timer(0.02, looker.close)
    leaving.start()
    held = lock_folder(tmp_path)
    leaving.join()
    assert held is not None
    assert lock.is_locked(tmp_path)
    held.release()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_nowhere_in_the_locks_place_is_told(tmp_path) -> None:
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(UserError, match="is a symbolic link"):
        lock_folder(tmp_path)


def test_what_a_killed_process_left_is_gone_after_the_next_one(tmp_path) -> None:
    place = tmp_path / ".model.partial"
    (place / "new").mkdir(parents=True)
    (place / "new" / "model.safetensors").write_text("half")
    (place / LOCK_FILE).touch()
    with atomic_create_dir(tmp_path / "model") as folder:
        assert not any(folder.iterdir())
        (folder / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "whole"


def test_a_folder_that_fails_leaves_nothing_and_one_that_is_there_stays(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_create_dir(tmp_path / "deep" / "model") as folder:
        (folder / "file").touch()
        raise RuntimeError
    assert not any(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(UserError, match="is there already"), atomic_create_dir(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "mine").exists()


@links
def test_a_new_folder_goes_where_a_link_to_an_empty_one_leads(tmp_path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to("big")
    (tmp_path / ".big.partial").symlink_to(tmp_path)
    with atomic_create_dir(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "file").exists()


def test_those_who_make_the_same_take_turns(tmp_path) -> None:
    made, said = [], []

    def make() -> None:
        with atomic_create(tmp_path / "model", log=said.append) as scratch:
            if not (tmp_path / "model").exists():
                scratch.write_text("whole")
                made.append(1)

    threads = [threading.Thread(target=make) for _ in range(8)]
    with lock_folder(tmp_path / ".model.partial"):
        for thread in threads:
            thread.start()
        while len(said) < len(threads):
            time.sleep(0.01)
        assert not made
    for thread in threads:
        thread.join()
    assert made == [1]
    assert (tmp_path / "model").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
