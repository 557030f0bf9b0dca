import sys

import pytest

from gptforge.report import progress
from gptforge.report.progress import EtaNotice, ProgressMeter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_pipe_gets_a_line_every_ten_seconds(clock, capsys) -> None:
    with ProgressMeter("preparing") as meter:
        meter.start(400_000_000, 100_000_000)
        for _ in range(30):
            clock[0] += 1
            meter.add(5_000_000, 8_000_000)
    lines = capsys.readouterr().err.splitlines()
    # 50 of 300 MB were read in 10 seconds: 50 more seconds.
    assert lines[0] == "preparing: 38%, 8.0 MB/s, about 50 seconds left"
    assert len(lines) == 3


def test_resumed_work_does_not_count_for_the_speed(clock, capsys) -> None:
    with ProgressMeter("preparing") as meter:
        meter.start(100, 90)
        clock[0] += 60
        meter.add(0, 0)
    assert capsys.readouterr().err == ""


def test_terminal_gets_a_bar(clock, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressMeter("preparing") as meter:
        meter.start(100, 10)
        clock[0] += 2
        meter.add(50, 4_000_000)
        meter.log("note: [brackets] stay as they are")
        assert meter._bar is not None
        task = meter._bar.tasks[0]
        assert (task.total, task.completed, task.fields["speed"]) == (100, 60, "2.0 MB/s")
    assert "note: [brackets] stay as they are" in capsys.readouterr().err


def test_eta_is_printed_once_and_only_for_long_tasks(clock, capsys) -> None:
    for seconds, lines in ((0.01, 0), (1, 1)):
        notice = EtaNotice("the evaluation")
        for done in range(1, 10):
            clock[0] += seconds
            notice(done, 20)
        assert len(capsys.readouterr().err.splitlines()) == lines
