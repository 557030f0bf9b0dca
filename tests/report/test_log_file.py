"""Logs on a disk that fills up: nothing is lost, nothing is torn, and training goes on."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gptforge.report import buffered_log
from gptforge.report.buffered_log import BufferedLog
from gptforge.report.run_report import RunReport
from tests.programs import events


class Disk:
    """Has room for so many more bytes."""

    def __init__(self) -> None:
        self.room = 10**9


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk, real = Disk(), buffered_log.open_regular

    class Limited(io.FileIO):
        def write(self, data: bytes) -> int:
            if not disk.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            some = data[: disk.room]
            disk.room -= len(some)
            return super().write(some)

    def limited(path: Path, mode: str = "r", **how: object) -> object:
        return Limited(str(path), "ab") if mode == "ab" else real(path, mode, **how)

    monkeypatch.setattr(buffered_log, "open_regular", limited)
    return disk


@pytest.fixture
def log(tmp_path: Path) -> BufferedLog:
    return BufferedLog(tmp_path / "log.md", lambda path, error: None)


def test_a_full_disk_leaves_no_half_of_a_line_and_gets_the_rest_later(log, disk) -> None:
    log.add("one\n")
    disk.workspace_bytes = 2
    log.add("two\n")
    assert log.path.read_text() == "one\n"
    log.add("three\n")
    assert log.path.read_text() == "one\n"
    assert log.waiting == "two\nthree\n"
    disk.workspace_bytes = 100
    log.add("four\n")
    assert log.path.read_text() == "one\ntwo\nthree\nfour\n"
    assert log.waiting == ""


def test_half_a_line_that_could_not_be_taken_back_is_taken_back_later(log, disk) -> None:
    log.add("one\n")
    disk.workspace_bytes = 2
    log.add("two\n")
    # A disk that refuses everything, even that.
    log.path.write_text("one\ntw")
    assert log.size == 8
    disk.workspace_bytes = 100
    log.add("three\n")
    assert log.path.read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("is_written", [True, False])
def test_a_length_that_counts_what_waits_is_where_it_is_cut(log, disk, is_written) -> None:
    log.add("one\n")
    disk.workspace_bytes = 0
    log.add("two\n")
    size = log.size
    log.add("three\n")
    if is_written:
        disk.workspace_bytes = 100
        log.add("four\n")
    log.cut(size)
    disk.workspace_bytes = 100
    log.add("again\n")
    assert log.path.read_text() == "one\ntwo\nagain\n"


def event(step: int) -> dict[str, float]:
    names = ("loss", "dt_ms", "tok_per_sec", "norm", "lr", "epoch")
    return {"step": step, **dict.fromkeys(names, 1.0)}


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], RunReport]:
    monkeypatch.setattr("gptforge.report.run_report.draw_curves", lambda *_, **__: None)
    report = RunReport(tmp_path, title="t")
    report.start("SUMMARY", command="c", facts={})
    return report


def test_logs_that_cannot_be_written_are_told_of_once_and_made_up_for(
    report, disk, tmp_path, capsys
) -> None:
    report.step(event(0))
    disk.workspace_bytes = 10
    for step in range(1, 5):
        report.step(event(step))
    said = capsys.readouterr().out
    assert said.count("warning:") == 1
    assert "log.md cannot be written (No space left on device): training goes on" in said
    disk.workspace_bytes = 10**6
    report.step(event(5))
    assert [e["step"] for e in events(tmp_path) if e["event"] == "train"] == list(range(6))


def test_the_verdict_knows_what_the_disk_did_not_take(report, disk, capsys) -> None:
    disk.workspace_bytes = 0
    report.step(event(0))
    report.log_eval(1, loss=2.5, bits_per_byte=1.0, epoch=1.0, is_best=True)
    report.end("finished", step=1, epochs=1.0, seconds=1, is_judged=True)
    said = capsys.readouterr().out
    assert "Best held-out loss 2.5000" in said
    assert "metrics.jsonl could not be written" in said
