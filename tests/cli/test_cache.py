"""`gptforge cache`."""

import os
import re
import time
from pathlib import Path

import pytest

from gptforge.data.cache import SPOOL_PREFIX, writable_cache
from gptforge.data.prepare.pipeline import REQUEST_FILE
from gptforge.data.shard_index import INDEX_FILE
from gptforge.lock import lock_folder
from tests.programs import DEBUG


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_cache_shows_its_folder_and_size_and_is_cleared(program, play) -> None:
    flags = (*DEBUG, "--input", play, "--tokenizer", "bpe", "--vocab_size", 300, "--max_steps", 1)
    assert program(*flags).code == 0
    shown = program("cache").out
    found = re.fullmatch(r"(\S+): 2 entries, ([\d.]+) MB\n", shown)
    assert found and Path(found[1]) == writable_cache(), shown
    size = sum(path.stat().st_size for path in writable_cache().rglob("*") if path.is_file())
    assert float(found[2]) == pytest.approx(size / 1e6, abs=0.06)
    assert program("cache", "--clear").out.endswith("data: 0 entries, 0.0 MB\n")
    # A finished run needs its text again, which is prepared again.
    assert "is finished" in program(*flags).out
    assert program("cache").out.endswith("MB\n")
    assert list(writable_cache().glob(f"*/{INDEX_FILE}"))


def test_what_another_process_prepares_is_kept(program) -> None:
    busy, spool = writable_cache() / "busy", writable_cache() / f"{SPOOL_PREFIX}x"
    spool.mkdir()
    lock = lock_folder(busy)
    assert lock is not None
    with lock:
        (busy / "part").write_text("unfinished")
        assert program("cache", "--clear").code == 0
        assert (busy / "part").read_text() == "unfinished"
    assert spool.is_dir()
    assert program("cache", "--clear").code == 0
    assert list(writable_cache().iterdir()) == [spool]


def test_a_wrong_clock_does_not_delete_what_was_just_prepared(program, play, monkeypatch) -> None:
    flags = (*DEBUG, "--input", play, "--max_steps", 1)
    monkeypatch.setattr(time, "time", lambda: 4e10)
    done = program(*flags)
    assert done.code == 0, done.err
    old, kept = writable_cache() / "old", next(writable_cache().glob(f"*/{INDEX_FILE}"))
    old.mkdir()
    (old / REQUEST_FILE).touch()
    os.utime(old / REQUEST_FILE, (1e9, 1e9))
    assert program(*flags).code == 0
    assert (old.exists(), kept.exists()) == (False, True)
