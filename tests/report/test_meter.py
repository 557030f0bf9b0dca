import pytest

from gptforge.report import progress as module
from gptforge.report.progress import PlainMeter, TerminalMeter, open_meter


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_now_and_then_with_speed_and_time_left(clock, capsys) -> None:
    with PlainMeter("preparing") as meter:
        meter.start(400_000_000, 100_000_000)
        for _ in range(30):
            clock[0] += 1
            meter.add(5_000_000, 8_000_000)
    lines = capsys.readouterr().err.splitlines()
    # 50 of 300 MB were read in 10 seconds: 50 more seconds.
    assert lines[0] == "preparing: 38%, 8.0 MB/s, about 50 seconds left"
    assert len(lines) == 3


def test_what_was_done_before_does_not_count_for_the_speed(clock, capsys) -> None:
    with PlainMeter("preparing") as meter:
        meter.start(100, 90)
        clock[0] += 60
        meter.add(0, 0)
    assert capsys.readouterr().err == ""


def test_a_bar_takes_the_same_calls(clock, capsys) -> None:
    with TerminalMeter("preparing") as meter:
        meter.start(100, 10)
        clock[0] += 2
        meter.add(50, 4_000_000)
        meter.log("note: [brackets] stay as they are")
        task = meter._progress.tasks[0]
        assert (task.total, task.completed, task.fields["speed"]) == (100, 60, "2.0 MB/s")
    assert "note: [brackets] stay as they are" in capsys.readouterr().err


def test_no_terminal_means_no_bar(capsys) -> None:
    assert isinstance(open_meter("preparing"), PlainMeter)
