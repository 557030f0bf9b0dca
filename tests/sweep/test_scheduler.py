"""Several runs at a time, with processes that only pretend to run."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptforge.errors import Terminated
from gptforge.sweep import scheduler
from gptforge.sweep.scheduler import Run, last_error, run_all, start_process
from tests.fork_server import get_context
from tests.programs import environment, events


class FakeProcess:
    """Ends after some polls."""

    def __init__(self, polls: int, code: int = 0) -> None:
        self.polls, self.code = polls, code
        self.signals: list[int] = []
        self.is_waited = self.is_killed = False

    def poll(self) -> int | None:
        self.polls -= 1
        return self.code if self.polls < 0 else None

    def send_signal(self, number: int, /) -> None:
        self.signals.append(number)

    def wait(self) -> int:
        self.is_waited = True
        return self.code

    def kill(self) -> None:
        self.is_killed = True


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0)


def runs(*trials: int) -> list[Run]:
    return [Run(str(trial), trial, Path(f"trial-{trial}"), ()) for trial in trials]


@pytest.mark.parametrize("jobs", [1, 2, 3, 10])
def test_every_run_starts_once_and_no_more_than_jobs_at_a_time(jobs) -> None:
    active: dict[int, int] = {}
    started, ended, most = [], [], 0

    def start(run: Run, slot: int) -> FakeProcess:
        nonlocal most
        assert slot in range(jobs) and slot not in active.values()
        active[run.seed] = slot
        started.append(run.seed)
        most = max(most, len(active))
        return FakeProcess(polls=run.seed % 4, code=run.seed)

    def on_end(run: Run, code: int) -> None:
        assert code == run.seed
        del active[run.seed]
        ended.append(run.seed)

    run_all([runs(1, 2), [], runs(3), runs(4, 5, 6)], jobs=jobs, start=start, on_end=on_end)
    assert started == sorted(ended) == [1, 2, 3, 4, 5, 6]
    assert most == min(jobs, 6)


def test_a_batch_is_taken_only_when_a_job_is_free() -> None:
    # So that a search knows all earlier losses when it picks the next values.
    ended: list[int] = []

    def batches() -> Iterator[list[Run]]:
        yield runs(1, 2)
        assert ended == [1]  # its job is free, while 2 is still running
        yield runs(3)
        assert 2 in ended

    run_all(
        batches(),
        jobs=2,
        start=lambda run, slot: FakeProcess(polls={1: 0, 2: 2, 3: 9}[run.seed]),
        on_end=lambda run, code: ended.append(run.seed),
    )
    assert ended == [1, 2, 3]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, Terminated, OSError])
def test_running_processes_are_stopped_and_waited_for(monkeypatch, reason) -> None:
    processes = [FakeProcess(100), FakeProcess(100)]

    def interrupt(seconds: float) -> None:
        raise reason

    monkeypatch.setattr(scheduler.time, "sleep", interrupt)
    monkeypatch.setattr(scheduler.os, "name", "posix")
    with pytest.raises(reason):
        run_all(
            [runs(1, 2, 3)],
            jobs=2,
            start=lambda run, slot: processes[slot],
            on_end=lambda run, code: pytest.fail("none ended"),
        )
    for process in processes:
        assert process.signals == [signal.SIGTERM]
        assert process.is_waited and not process.is_killed


def test_a_second_interrupt_kills(monkeypatch) -> None:
    class Stubborn(FakeProcess):
        def wait(self) -> int:
            raise KeyboardInterrupt

    process = Stubborn(100)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scheduler.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_all([runs(1)], jobs=1, start=lambda run, slot: process, on_end=lambda run, code: None)
    assert process.is_killed


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("step 1\nerror: no space\nerror: the disk is full\nbye\n", "the disk is full"),
        ("Traceback:\n  File\nValueError: odd\n\n", "ValueError: odd"),
        ("\n", "exit code 9"),
        (None, "exit code 9"),
    ],
)
def test_last_error(tmp_path, log, error) -> None:
    run = Run("1", 0, tmp_path / "trial-0001", ())
    if log is not None:
        run.log.write_text(log)
    assert last_error(run, 9) == error


def sweep_and_die(folder: Path, args: tuple[str, ...], stops_trials: bool) -> None:
    os.chdir(folder)
    os.environ |= environment()
    run = Run("1", 0, Path("trial-1"), args)
    process = start_process(run, device="cpu", jobs=1)
    metrics = Path("trial-1/metrics.jsonl")
    # Before the first step a stop has nothing to save.
    while not metrics.exists() or '"event": "train"' not in metrics.read_text():
        assert process.poll() is None, run.log.read_text()
        time.sleep(0.01)
    if stops_trials:
        process.terminate()  # as a sweep does after Ctrl-C
    os.kill(os.getpid(), 9)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
@pytest.mark.parametrize("stops_trials", [False, True])
def test_a_trial_of_a_killed_sweep_saves_and_ends(tmp_path, play, stops_trials) -> None:
    args = ("--preset=debug", f"--input={play}", "--max_steps=100000", "--out_dir=trial-1")
    sweep = get_context().Process(target=sweep_and_die, args=(tmp_path, args, stops_trials))
    sweep.start()
    sweep.join()
    assert sweep.exitcode == -9
    deadline = time.monotonic() + 120
    metrics = tmp_path / "trial-1/metrics.jsonl"
    while '"event": "end"' not in metrics.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert events(tmp_path / "trial-1")[-1]["reason"] == "terminated"
    assert (tmp_path / "trial-1/checkpoints/last").exists()
