import errno
import io
import os
from pathlib import Path

import pytest

from gptforge.config import Config
from gptforge.report import buffered_log
from gptforge.report.buffered_log import BufferedLog
from gptforge.report.format import ValLoss
from gptforge.report.run_report import RunReport
from tests.programs import events
from tests.report.events import train_event


class Disk:
    """A disk with `free` bytes left."""

    def __init__(self) -> None:
        self.free = 10**9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, open_regular = Disk(), buffered_log.open_regular

    class LimitedFile(io.FileIO):
        def write(self, data: bytes) -> int:
            if not disk.free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = data[: disk.free]
            disk.free -= len(written)
            return super().write(written)

    def open_limited(path: Path, mode: str = "r", **options: object) -> object:
        is_append = mode == "ab"
        return LimitedFile(str(path), "ab") if is_append else open_regular(path, mode, **options)

    monkeypatch.setattr(buffered_log, "open_regular", open_limited)
    return disk


@pytest.fixture
def log(tmp_path: Path) -> BufferedLog:
    return BufferedLog(tmp_path / "log.md", lambda path, error: None)


def test_a_full_disk_leaves_no_partial_line_and_gets_the_rest_later(log, disk) -> None:
    log.write("one\n")
    disk.free = 2
    log.write("two\n")
    assert log.path.read_text() == "one\n"
    log.write("three\n")
    assert log.path.read_text() == "one\n"
    assert log.pending == "two\nthree\n"
    disk.free = 100
    log.write("four\n")
    assert log.path.read_text() == "one\ntwo\nthree\nfour\n"
    assert log.pending == ""


def test_a_partial_line_that_could_not_be_removed_is_removed_later(log, disk) -> None:
    log.write("one\n")
    disk.free = 2
    log.write("two\n")
    # As if the disk had refused to truncate, too.
    log.path.write_text("one\ntw")
    assert log.size == 8
    disk.free = 100
    log.write("three\n")
    assert log.path.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("is_flushed", [True, False])
def test_truncate_to_a_size_that_includes_pending_text(log, disk, is_flushed) -> None:
    log.write("one\n")
    disk.free = 0
    log.write("two\n")
    size = log.size
    log.write("three\n")
    if is_flushed:
        disk.free = 100
        log.write("four\n")
    log.truncate(size)
    disk.free = 100
    log.write("again\n")
    assert log.path.read_text() == "one\ntwo\nagain\n"


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunReport:
    monkeypatch.setattr("gptforge.report.run_report.save_curves", lambda *_, **__: None)
    report = RunReport(Config(out_dir=str(tmp_path), max_steps=9), title="t")
    report.start("SUMMARY", {"command": "c"})
    return report


def test_a_full_disk_is_reported_once_and_lines_are_added_later(
    report, disk, tmp_path, messages
) -> None:
    report.log_step(train_event(0))
    disk.free = 10
    for step in range(1, 5):
        report.log_step(train_event(step))
    out = "\n".join(messages)
    assert out.count("warning:") == 1
    assert "log.md cannot be written (the disk is full): training continues" in out
    disk.free = 10**6
    report.log_step(train_event(5))
    assert [e["step"] for e in events(tmp_path) if e["event"] == "train"] == list(range(6))


def test_the_verdict_includes_pending_events(report, disk, messages) -> None:
    disk.free = 0
    report.log_step(train_event(0))
    report.log_eval(1, ValLoss(22.5, 9, 9, 9), epoch=1.0, is_best=True)
    report.finish("finished", step=1, epochs=1.0, seconds=1, has_val=True)
    out = "\n".join(messages)
    assert "Best held-out loss 2.5000" in out
    assert "metrics.jsonl could not be written" in out
