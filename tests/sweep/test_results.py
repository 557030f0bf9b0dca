"""Ranking trials by the metrics of their runs."""

import csv
import json
import math
from pathlib import Path

import pytest

from gptforge.sweep.results import (
    RunResult,
    TrialResult,
    read_result,
    table,
    trial_result,
    write_results,
)
from tests.report.events import final_event


def write_run(folder: Path, losses: dict[int, float | None], end: dict | None) -> Path:
    folder.mkdir()
    events = [
        {"event": "eval", "step": step, "val_loss": loss, "val_bpb": loss and 2 * loss, "epoch": 1}
        for step, loss in losses.items()
    ]
    lines = [json.dumps(event) for event in [*events, end] if event]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize("reason", ["finished", "early_stop", "time_limit"])
def test_a_finished_run_has_its_evaluations(tmp_path, reason) -> None:
    end = {"event": "end", "reason": reason, "seconds": 7.5}
    run = write_run(tmp_path / "run", {10: 3.0, 20: None, 30: 2.0}, end)
    assert read_result(run) == RunResult({10: (3.0, 6.0), 30: (2.0, 4.0)}, 7.5)


@pytest.mark.parametrize(
    ("losses", "end"),
    [
        ({10: 3.0}, None),
        ({10: 3.0}, {"event": "end", "reason": "interrupted", "seconds": 1}),
        ({10: None}, {"event": "end", "reason": "finished", "seconds": 1}),
        ({}, {"event": "end", "reason": "finished", "seconds": 1}),
    ],
)
def test_other_runs_have_no_result(tmp_path, losses, end) -> None:
    assert read_result(write_run(tmp_path / "run", losses, end)) is None
    assert read_result(tmp_path / "missing") is None


def test_a_trial_is_ranked_at_the_step_with_the_lowest_mean_over_seeds() -> None:
    runs = [
        RunResult({10: (2.0, 1.0), 20: (1.0, 1.0), 30: (1.9, 2.0)}, 10.0),
        RunResult({10: (2.0, 1.0), 20: (3.0, 1.0), 30: (1.7, 4.0)}, 20.0),
    ]
    result = trial_result("five", {"max_lr": 1e-3}, runs)
    assert (result.step, result.losses, result.bits_per_byte) == (30, (1.9, 1.7), 3.0)
    assert result.loss == pytest.approx(1.8)
    assert result.spread == pytest.approx(math.sqrt(0.02))
    assert result.seconds == 15.0
    assert trial_result("five", {}, runs, step=20).losses == (1.0, 3.0)


def test_the_loss_on_all_held_out_text_replaces_that_of_evaluations(tmp_path) -> None:
    end = {"event": "end", "reason": "finished", "step": 30, "epoch": 1.0, "seconds": 5}
    end |= final_event(30, loss=1.9, tokens=99)
    run = read_result(write_run(tmp_path / "run", {10: 3.0, 30: 2.0}, end))
    assert run is not None and run.final == (1.9, 0.95)
    for use_final, expected in ((True, (1.9, 0.95)), (False, (2.0, 4.0))):
        result = trial_result("five", {}, [run], use_final=use_final)
        assert (result.loss, result.bits_per_byte) == expected
        assert result.step == 30


def test_a_trial_without_one_of_its_seeds_has_no_loss() -> None:
    run = RunResult({10: (2.0, 1.0)}, 10.0)
    result = trial_result("five", {}, [run, None], error="out of memory")
    assert not result.losses and result.loss == math.inf
    assert result.error == "out of memory"


RESULTS = [
    TrialResult("b", {"max_lr": 0.002, "shuffle": True}, (1.5, 1.7), 1500, 2.25, 40.0),
    TrialResult("a", {"max_lr": 0.001, "shuffle": False}, error="it broke, badly"),
]


def test_results_are_written_as_csv(tmp_path) -> None:
    write_results(tmp_path, RESULTS)
    with (tmp_path / "results.csv").open(newline="") as file:
        best, failed = csv.DictReader(file)
    assert best["trial"] == "b" and best["max_lr"] == "0.002" and best["best_step"] == "1500"
    assert float(best["val_loss"]) == pytest.approx(1.6)
    assert float(best["val_loss_std"]) == pytest.approx(0.141421)
    assert failed["val_loss"] == "" and failed["error"] == "it broke, badly"


def test_the_table_lines_up() -> None:
    lines = table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["b", "0.002", "true", "1.600000", "0.141421", "2.250000", "1500", "40.0", ""]
    assert "it broke, badly" in lines[3]
