import errno
import io
import sys

import pytest

from gptforge.report import console
from gptforge.report.console import Console, ProgressMeter, track


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def open_terminal(monkeypatch):
    """Makes stderr a terminal; called in the test, since pytest replaces it before."""

    def open_terminal() -> io.StringIO:
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return open_terminal


def test_pipe_gets_nothing(clock, capsys) -> None:
    with ProgressMeter("preparing") as meter:
        meter.start(400_000_000, 100_000_000)
        for _ in range(30):
            clock[0] += 100
            meter.add(5_000_000, 8_000_000)
    assert list(track("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_terminal_gets_a_bar(clock, open_terminal) -> None:
    terminal = open_terminal()
    with ProgressMeter("preparing") as meter:
        meter.start(100, 10)
        clock[0] += 2
        meter.add(50, 4_000_000)
        meter.log("note: [brackets] stay as they are")
        assert meter._bar is not None
        task = meter._bar.tasks[0]
        assert (task.total, task.completed, task.fields["status"]) == (100, 60, "2.0 MB/s")
        meter(3, 4, "writing")
        assert (task.percentage, task.fields["status"]) == (75, "writing")
    assert "note: [brackets] stay as they are" in terminal.getvalue()


def test_resumed_work_does_not_count_for_the_time_left(open_terminal, monkeypatch) -> None:
    open_terminal()
    now = [0.0]
    with ProgressMeter("preparing") as meter:
        monkeypatch.setattr(meter._bar, "get_time", lambda: now[0])
        meter._bar.tasks[0]._get_time = lambda: now[0]
        meter.start(1000, 900)
        for _ in range(5):
            now[0] += 1
            meter.add(10, 10)
        assert meter._bar.tasks[0].time_remaining == 5


def test_output_in_a_file_stays_there_while_a_bar_is_shown(capsys, open_terminal) -> None:
    open_terminal()
    with ProgressMeter("evaluating"):
        print("result")
    assert capsys.readouterr().out == "result\n"


def test_items_are_counted(open_terminal) -> None:
    terminal = open_terminal()
    assert [item * 2 for item in track([1, 2, 3], "reading")] == [2, 4, 6]
    assert "reading" in terminal.getvalue()


class Minimal:
    """What other programs put in place of standard output: no isatty, no fileno."""

    encoding = "ascii"

    def __init__(self, error: OSError | None = None) -> None:
        self.text, self.error = "", error

    def write(self, text: str) -> None:
        if self.error:
            raise self.error
        self.text += text.encode(self.encoding).decode()

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("stdout", [None, Minimal(), Minimal(OSError(errno.EIO, "gone"))])
def test_training_needs_no_standard_output_of_its_own(monkeypatch, stdout) -> None:
    # In a service or a window there is none; its encoding may lack what is printed.
    monkeypatch.setattr("sys.stdout", stdout)
    with Console(total=3) as console:
        console.log("└─ step 1")
        console.update(1, "")
        console.log("step 2")
    if stdout and not stdout.error:
        assert stdout.text == "?? step 1\nstep 2\n"
