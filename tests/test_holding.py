import errno
import os
import tempfile
import threading
import time

import pytest

from gptforge import holding
from gptforge.errors import UserError
from gptforge.holding import LOCK, hold

links = pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")


@links
def test_a_folder_is_held_whatever_path_leads_to_it(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "parent").symlink_to(tmp_path)
    with hold(tmp_path / "run"):
        for path in ("run", "link", "parent/run", "parent/parent/link", "run/../run"):
            assert hold(tmp_path / path) is None, path
    with hold(tmp_path / "link"):
        assert hold(tmp_path / "run") is None


def test_a_folder_is_held_whatever_the_temporary_folder_is(tmp_path, monkeypatch) -> None:
    with hold(tmp_path / "run"):
        (tmp_path / "tmp").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        assert hold(tmp_path / "run") is None


def test_letting_go_leaves_nothing_that_was_made_for_the_lock(tmp_path) -> None:
    hold(tmp_path / "runs/one").close()
    assert not any(tmp_path.iterdir())
    with hold(tmp_path / "runs/one") as held:
        (tmp_path / "runs/one/log.md").write_text("mine")
    held.close()
    assert [path.name for path in (tmp_path / "runs/one").iterdir()] == ["log.md"]


def test_a_folder_that_is_set_aside_leaves_a_new_one_held(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.md").write_text("old")
    with hold(run) as held:
        aside = held.set_aside("old")
        assert [path.name for path in aside.iterdir()] == ["log.md"]
        assert [path.name for path in run.iterdir()] == [LOCK]
        assert hold(run) is None
        hold(aside).close()
    hold(run).close()


def test_who_waited_for_a_folder_keeps_others_away_from_it(tmp_path) -> None:
    first, waited = hold(tmp_path), []
    thread = threading.Thread(target=lambda: waited.append(hold(tmp_path, wait=True)))
    thread.start()
    time.sleep(0.05)
    assert not waited
    first.close()
    thread.join(30)
    # The file that it waited for was deleted: it must have the lock of the one that is there.
    assert hold(tmp_path) is None
    waited[0].close()
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other locks")
def test_on_a_disk_without_locks_this_machine_is_kept_away(tmp_path, monkeypatch) -> None:
    import fcntl

    real = fcntl.flock

    def refuse(file, how) -> None:
        if file.name == str(tmp_path / "run" / LOCK):
            raise OSError(errno.ENOLCK, "no locks available")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with hold(tmp_path / "run"):
        assert hold(tmp_path / "run") is None
    hold(tmp_path / "run").close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no shared locks")
def test_who_looks_whether_a_folder_is_held_keeps_nobody_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(holding, "PAUSE", 0.2)
    (tmp_path / LOCK).touch()
    looker = (tmp_path / LOCK).open("r+")
    assert holding._lock(looker, wait=False, shared=True)
    assert not holding.is_held(tmp_path), "by another one who looks"
    leaving = threading.Timer(0.02, looker.close)
    leaving.start()
    held = hold(tmp_path)
    leaving.join()
    assert held is not None
    assert holding.is_held(tmp_path)
    held.close()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_nowhere_in_the_locks_place_is_told(tmp_path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "nowhere" / "file")
    with pytest.raises(UserError, match="is a symbolic link"):
        hold(tmp_path)
