"""What is read from a run folder."""

import json
import os
import shutil

import pytest

from gptforge.errors import UserError
from gptforge.lock import lock_folder
from gptforge.report.run_info import disk_bytes, find_runs, read_run, read_samples
from tests.programs import ROOT
from tests.report.run_folders import write_run


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("finished", "complete"),
        ("early_stop", "complete"),
        ("time_limit", "time limit"),
        ("interrupted", "stopped"),
        ("anything", "stopped"),
        (None, "unfinished"),
    ],
)
def test_state_of_a_run(tmp_path, reason, state) -> None:
    run = read_run(write_run(tmp_path / "run", {10: 3.0, 20: 2.0}, reason=reason))
    assert run.state == state
    best = run.history.best
    assert (run.history.steps, best["step"], best["val_loss"]) == (20, 20, 2.0)
    assert run.seconds == (90.0 if reason else None)


def test_a_locked_run_without_an_end_is_running(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0}, reason=None, text="To be")
    with lock_folder(folder):
        assert read_run(folder).state == "running"
    run = read_run(folder)
    # From the checkpoint, as there is no end event.
    assert (run.state, run.seconds) == ("unfinished", 60.0)


def test_a_resumed_run_has_not_ended(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "resume", "step": 10}) + "\n")
    assert read_run(folder).state == "unfinished"


def test_facts_are_those_of_the_last_start(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0}, reason=None)
    assert read_run(folder).facts["device"] == "cpu"
    with (folder / "metrics.jsonl").open("a") as file:
        for event in ({"step": 9, "checkpoint": "c", "device": "cuda:0", "ranks": 2}, {"step": 10}):
            file.write(json.dumps({"event": "resume", **event}) + "\n")
    facts = read_run(folder).facts
    assert (facts["device"], facts["dtype"], facts["ranks"]) == ("cuda:0", "float32", 2)
    assert not facts.keys() & {"event", "step", "checkpoint"}


def test_a_run_of_version_0_1(tmp_path) -> None:
    shutil.copytree(ROOT / "tests/golden/run-0.1", tmp_path / "run", symlinks=True)
    run = read_run(tmp_path / "run")
    assert run.state in ("complete", "time limit")
    assert run.history.best is not None and run.seconds and run.facts["gptforge"] == "0.1.0"
    assert run.tokenizer != run.config.tokenizer and run.has_same_text(run)


def test_what_is_no_run_is_refused_in_one_line(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0}, text="To be")
    (tmp_path / "empty").mkdir()
    for name, problem in (("empty", "no config.toml"), ("missing", "does not exist")):
        with pytest.raises(UserError, match=f"{name} .*{problem}"):
            read_run(tmp_path / name)
    (folder / "config.toml").write_text("n_layer = [")
    with pytest.raises(UserError, match="not a readable TOML file"):
        read_run(folder)
    (folder / "config.toml").write_text("n_layer = 2\n")
    with pytest.raises(UserError, match="is not from training"):
        read_run(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a model: give its run folder"):
        read_run(folder)


def test_damaged_logs_and_checkpoints_still_give_a_run(tmp_path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0}, text="To be")
    (folder / "metrics.jsonl").write_bytes(
        b'\xff\x00{"event": "end"}\n{"event": "end", "reason": []}'
    )
    (folder / "checkpoints/step-000010/state.json").write_text("{")
    run = read_run(folder)
    assert (run.state, run.seconds) == ("unfinished", None)
    assert (run.history.steps, run.history.best) == (0, None)
    assert run.tokenizer == run.config.tokenizer
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).modified > 0


def test_runs_are_found_below_a_folder(tmp_path) -> None:
    runs = [write_run(tmp_path / name, {10: 3.0}) for name in ("a", "sweep/b", "sweep/.hidden/c")]
    write_run(tmp_path / "a/teachers/teacher-1", {10: 3.0})
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == runs[:2]
    assert find_runs(tmp_path / "a") == runs[:1]


def test_disk_bytes_does_not_follow_links(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").write_bytes(b"x" * 1000)
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    if os.name != "nt":
        (tmp_path / "run/link").symlink_to(tmp_path / "large")
        (tmp_path / "run/folder").symlink_to(tmp_path, target_is_directory=True)
    assert 1000 <= disk_bytes(tmp_path / "run") < 2000


def test_samples_are_read_back(tmp_path) -> None:
    path = tmp_path / "samples.md"
    assert read_samples(path) == []
    text = "# Samples: run\n\n## After 5 steps\n\n~~~text\n\n a\n~~~\n"
    tildes = "\n## After 10 steps\n\n~~~~text\nb\n~~~\n## After 7 steps\n~~~~\n"
    path.write_text(text + tildes)
    samples = [(5, " a"), (10, "b\n~~~\n## After 7 steps")]
    assert read_samples(path) == samples
    path.write_text(text + tildes + "\n## After 20 steps\n\n~~~text\ncut o")
    assert read_samples(path) == samples


def test_a_hostile_file_is_read_in_linear_time(tmp_path) -> None:
    path = tmp_path / "samples.md"
    path.write_text("## After 1 steps\n\n~~~text\n" * 100_000)
    assert read_samples(path) == []
    path.write_text(f"## After {'9' * 5000} steps\n\n~~~text\na\n~~~\n")
    assert read_samples(path) == []
