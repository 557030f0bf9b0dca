"""Trackers that fail, hang or resume: a fake one stands in for MLflow, which is not needed here."""

import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from gptforge.config import Config
from gptforge.report import trackers
from gptforge.report.trackers import Tracker, Trackers, Values
from tests.programs import DEBUG, events

FLAGS = (*DEBUG, "--input", "play.txt", "--out_dir", "run", "--eval_every", 2, "--save_every", 2)


@dataclass
class Fake:
    """Records what it gets; `fail` is called at each use with open, log or finish."""

    fail: Callable[[str], object] = lambda action: None
    ids: list[str] = field(default_factory=list)
    logged: list[tuple[int, Values]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def open(self, id: str, folder: Path, config: Config) -> Tracker:
        self.fail("open")
        self.ids.append(id)

        def log(step: int, values: Values) -> None:
            self.fail("log")
            self.logged.append((step, values))

        def finish(reason: str) -> None:
            self.fail("finish")
            self.reasons.append(reason)

        return Tracker(id or f"new-{len(self.ids)}", "see the fake", log, finish)

    def steps(self, name: str) -> list[int]:
        return [step for step, values in self.logged if name in values]


@pytest.fixture
def fake(monkeypatch) -> Fake:
    module = ModuleType("mlflow")
    module.__spec__ = ModuleSpec("mlflow", None)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    fake = Fake()
    monkeypatch.setitem(trackers.OPENERS, "mlflow", fake.open)
    return fake


def losses() -> list[float]:
    return [event["loss"] for event in events() if event["event"] == "train"]


def raising(*actions: str) -> Callable[[str], None]:
    def fail(action: str) -> None:
        if action in actions:
            raise RuntimeError(f"no {action} today")

    return fail


def test_a_run_sends_its_events_and_a_longer_one_continues_it(fake, program, play) -> None:
    for steps in (4, 6):
        done = program(*FLAGS, "--max_steps", steps, "--sample_every", 2, "--tracker", "mlflow")
        assert done.code == 0
        assert done.out.count("mlflow: see the fake") == 1
    assert fake.ids == ["", "new-1"]
    assert fake.reasons == ["finished"] * 2
    assert fake.steps("train/loss") == list(range(6))
    assert fake.steps("eval/val_loss") == [2, 4, 6]
    assert fake.steps("sample/text") == [2, 4, 6]
    assert fake.steps("end/training_curves") == [4, 6]
    sent = [values["train/loss"] for _, values in fake.logged if "train/loss" in values]
    assert sent == losses()


def test_steps_made_again_after_an_interruption_are_not_sent_again(fake, tmp_path) -> None:
    config = Config(out_dir=str(tmp_path / "run"))
    for steps in (range(5), range(3, 8)):
        with Trackers(["mlflow"], config) as to:
            for step in steps:
                to.log("train", step, {"loss": 1.0})
                to.log("eval", step + 1, {"val_loss": 1.0})
            to.finish("interrupted")
    assert fake.steps("train/loss") == list(range(8))
    assert fake.steps("eval/val_loss") == list(range(1, 9))


def test_a_killed_run_sends_nothing_twice(fake, tmp_path) -> None:
    # What is sent is on disk before it is sent.
    record = tmp_path / "run" / "tracking" / "mlflow.json"
    on_disk: list[int] = []

    def look(action: str) -> None:
        if action == "log":
            on_disk.append(json.loads(record.read_text())["sent"]["train"])

    fake.fail = look
    with Trackers(["mlflow"], Config(out_dir=str(tmp_path / "run"))) as to:
        for step in range(3):
            to.log("train", step, {"loss": 1.0})
        to.finish("finished")
    assert on_disk == [0, 1, 2]


@pytest.mark.parametrize("actions", [["open"], ["log"], ["finish"], ["log", "finish"]])
def test_a_tracker_that_fails_is_reported_once_and_changes_nothing(
    fake, program, play, actions
) -> None:
    assert program(*FLAGS, "--max_steps", 4).code == 0
    expected = losses()
    fake.fail = raising(*actions)
    done = program(*FLAGS, "--max_steps", 4, "--tracker", "mlflow", "--restart")
    assert done.code == 0
    assert done.out.count("warning: mlflow: ") == 1
    assert f"no {actions[0]} today" in done.out
    assert losses() == expected


@pytest.mark.parametrize("error", [OSError("network down"), SystemExit(3)])
def test_after_a_failed_event_later_ones_are_sent(fake, tmp_path, messages, error) -> None:
    failures = iter([error, None, None])

    def fail(action: str) -> None:
        if action == "log" and (failure := next(failures)):
            raise failure

    fake.fail = fail
    with Trackers(["mlflow"], Config(out_dir=str(tmp_path))) as to:
        for step in range(3):
            to.log("train", step, {"loss": 1.0})
        to.finish("finished")
    assert fake.steps("train/loss") == [1, 2]
    assert [line for line in messages if line.startswith("warning: mlflow: ")]


def test_a_deleted_folder_of_tracked_files_stops_no_events(fake, tmp_path) -> None:
    fake.fail = lambda action: shutil.rmtree(tmp_path / "tracking", ignore_errors=True)
    with Trackers(["mlflow"], Config(out_dir=str(tmp_path))) as to:
        for step in range(3):
            to.log("train", step, {"loss": 1.0})
        to.finish("finished")
    assert fake.steps("train/loss") == [0, 1, 2]


def test_a_tracker_that_hangs_delays_neither_a_step_nor_the_end(fake, tmp_path, messages) -> None:
    released = threading.Event()
    fake.fail = lambda action: action == "log" and released.wait(60)
    with Trackers(["mlflow"], Config(out_dir=str(tmp_path))) as to:
        for step in range(1000):
            to.log("train", step, {"loss": 1.0})
        to.finish("finished", 0.05)
    assert not fake.logged
    assert messages[-1] == "warning: mlflow: not all was sent in 0.05 seconds"
    released.set()


def test_an_error_ends_the_tracked_run_as_failed(fake, tmp_path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        Trackers(["mlflow"], Config(out_dir=str(tmp_path))) as to,
    ):
        to.log("train", 0, {"loss": 1 / 0})
    assert fake.reasons == ["failed"]


def test_a_start_without_a_checkpoint_leaves_no_tracked_run(fake, program, play) -> None:
    record = Path("run/tracking/mlflow.json")
    record.parent.mkdir(parents=True)
    record.write_text('{"id": "old", "sent": {"train": 99}}')
    assert program(*FLAGS, "--max_steps", 2, "--tracker", "mlflow").code == 0
    assert fake.ids == [""]
    assert fake.steps("train/loss") == [0, 1]


def test_a_missing_package_is_an_error_before_training(program, play, monkeypatch) -> None:
    find_spec = importlib.util.find_spec
    missing = {"trackio"}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in missing else find_spec(name, *a),
    )
    done = program(*FLAGS, "--tracker", "trackio")
    assert done.code == 2
    assert "pip install -e '.[trackio]'" in done.err
    assert not Path("run").exists()


def test_a_linked_folder_of_tracked_files_is_refused(program, play, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracking").symlink_to(tmp_path)
    done = program(*FLAGS, "--max_steps", 1)
    assert done.code == 2
    assert "tracking is a link" in done.err
