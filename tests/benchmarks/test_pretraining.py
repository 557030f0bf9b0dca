"""`benchmarks/pretraining.py`: which runs a mode has, what is run again, and what results say."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gptforge import UserError
from tests.environment import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import pretraining as bench
import pretraining_results

TINY = ["--", "--batch_size", "2", "--gradient_accumulation_steps", "1", "--context_length", "50"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / "train_000000.bin").write_bytes(b"tokens")
    return folder


def options(mode: str, data: Path, *args: str) -> Any:
    return bench.parse_options([mode, str(data), "--out", str(data.parent), *args, *TINY])


def result(trial: bench.Trial, loss: float, **changes: Any) -> bench.Result:
    config = bench.parse(trial.flags)
    steps = config.max_steps
    return {
        **vars(trial), "state": bench.COMPLETE, "steps": steps, "max_steps": steps,
        "tokens_per_step": config.tokens_per_step, "val_loss": loss, "val_bpb": loss / 3,
        "best_step": steps, "last_val_loss": loss, "ms_per_step": 10.0, "tok_per_sec": 1e4,
        "curve": [[steps // 2, loss + 1, loss / 3 + 1], [steps, loss, loss / 3]],
        "seconds": 1.0, "facts": {}, **changes,
    }  # fmt: skip


def test_sweep_alternates_and_starts_in_the_middle(data) -> None:
    grid = ["--rates", "1e-4", "1e-3", "1e-2", "--decays", "0.1"]
    trials = bench.sweep_trials(options("sweep", data, *grid, "--tokens", "1e4"))
    settings = [bench.optimizer_of(vars(trial)) for trial in trials]
    assert settings[:4] == [
        ("adamw", 1e-3, 0.1), ("muon", 2e-3, 0.4), ("adamw", 1e-4, 0.1), ("muon", 1e-3, 0.4),
    ]  # fmt: skip
    assert len(settings) == len(set(settings)) == 3 + 9
    configs = [bench.parse(trial.flags) for trial in trials]
    assert {c.max_steps for c in configs} == {100}
    assert {c.warmup_steps for c in configs} == {10}
    assert configs[0].min_lr == 1e-4
    assert configs[1].max_lr == bench.AUXILIARY_RATE


def test_race_takes_the_best_of_the_longest_runs(data) -> None:
    race = options("race", data, "--tokens", "1e5", "--fraction", "0.65")
    with pytest.raises(SystemExit, match="no finished run of adamw in the sweep"):
        bench.race_trials(race, [])
    results = []
    for tokens, losses in (("1e4", 0.0), ("2e4", 2.0)):
        trials = bench.sweep_trials(options("sweep", data, "--tokens", tokens))
        results += [result(trial, losses + 1 / (1 + i)) for i, trial in enumerate(trials)]
    results[-1]["state"] = "stopped"
    trials = bench.race_trials(race, results)
    names = [trial.name for trial in trials]
    assert names == [results[-2]["name"], results[-3]["name"]]
    steps = [bench.parse(trial.flags).max_steps for trial in trials]
    assert steps == [1000, 650]
    explicit = options("race", data, "--rate", "1e-3", "--decay", "1", "--muon_decay", "3")
    adamw, muon = bench.race_trials(explicit, results)
    assert adamw.name == "adamw, rate 0.001, decay 1"
    assert muon.name == names[1].rpartition(" ")[0] + " 3"


def test_results_of_other_data_do_not_count(data) -> None:
    trials = bench.sweep_trials(options("sweep", data))
    (data / "train_000000.bin").write_bytes(b"others")
    with pytest.raises(SystemExit, match="no finished run"):
        bench.race_trials(options("race", data), [result(trial, 3.0) for trial in trials])
    (data / "train_000000.bin").unlink()
    with pytest.raises(SystemExit, match="no token shards"):
        bench.fingerprint(data)


def test_crossing_is_between_two_evaluations(data) -> None:
    curve = {"curve": [[100, 5.0, 2.0], [200, 4.0, 1.0], [300, 3.0, 0.5]]}
    assert pretraining_results.crossing(curve, 3.5) == 250
    assert pretraining_results.crossing(curve, 0.75, column=2) == 250
    assert pretraining_results.crossing(curve, 5.0) == 100
    assert pretraining_results.crossing(curve, 2.9) is None


def test_verdicts(data) -> None:
    flags = ["--rate", "1e-3", "--decay", "1", "--muon_rate", "1e-3", "--muon_decay", "1"]
    adamw, muon = bench.race_trials(options("race", data, "--tokens", "1e5", *flags), [])
    results = [result(adamw, 3.0), result(muon, 2.5, ms_per_step=10.2)]
    text = bench.verdict(results)
    assert "AdamW's best evaluation in 0.1M tokens is 3.0000." in text
    # Half of the way from step 325 with 3.5 to step 650 with 2.5, of AdamW's 1,000 steps.
    assert "reaches it at 0.0M, 48.8% of AdamW's tokens; its steps take +2.0%" in text
    assert text.endswith("Their losses on all held-out text: 3.0000 and 2.5000.")
    assert "not finished" in bench.verdict([results[0], result(muon, 2.5, state="stopped")])
    bf16, fp8 = bench.dtype_trials(options("dtypes", data))
    text = bench.verdict([result(bf16, 3.0), result(fp8, 3.015, tok_per_sec=1.3e4)])
    assert "held-out loss +0.50%" in text and "tokens/s +30.0%" in text


def test_best_at_the_edge_of_the_grid(data) -> None:
    trials = bench.sweep_trials(options("sweep", data))
    results = [result(trial, 3.0 + i) for i, trial in enumerate(trials)]
    first, second = bench.verdict(results).splitlines()
    assert first == "Best of 9: adamw, rate 0.0012, decay 0.4: 3.0000."
    results[1]["val_loss"] = None
    second = bench.verdict(results).splitlines()[1]
    assert second.startswith("Best of 8: muon, rate 0.001, decay 0.4: 6.0000; its rate at the edge")


def test_fine_tuning_takes_a_share_of_the_steps(tmp_path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("A sentence of a book.\n" * 2_000, encoding="utf-8")
    args = ["finetune", str(text), "--init_from", "run", "--out", str(tmp_path), "--device", "cpu"]
    trials = bench.finetune_trials(bench.parse_options([*args, "--", "--max_steps", "200"]))
    assert [trial.name for trial in trials] == [bench.FROM_SCRATCH, bench.FINE_TUNED]
    steps = [bench.parse(trial.flags).max_steps for trial in trials]
    assert steps == [200, 20]
    results = [result(trials[0], 3.0), result(trials[1], 1.5)]
    assert "book: -50.00% bits per byte in 20 steps" in bench.verdict(results)
    assert "fine-tuning reaches it at step 15, 1/13" in bench.verdict(results)
    bench.draw(results, tmp_path / "finetune.png")
    assert (tmp_path / "finetune.png").stat().st_size > 10_000


def test_only_what_is_not_finished_runs_again(data, monkeypatch, capsys) -> None:
    trials = bench.dtype_trials(options("dtypes", data, "--dtypes", "float32", "bfloat16", "fp8"))
    started: list[list[str]] = []

    def run_all(batches: Any, *, jobs: int, start: Any, on_end: Any) -> None:
        runs = list(batches[0])
        started.append([run.trial.split("-")[1] for run in runs])
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
        if len(started) == 2:
            on_end(runs[0], 1)
            return
        on_end(runs[0], 0)
        raise bench.Stop  # in the second run; the third has not started

    def read_result(trial: bench.Trial, folder: Path) -> bench.Result:
        if trial.name == "fp8":
            raise UserError("no run")
        return result(trial, 3.0, state="complete" if trial.name == "float32" else "stopped")

    monkeypatch.setattr(bench.scheduler, "run_all", run_all)
    monkeypatch.setattr(bench, "read_result", read_result)
    runner = bench.Runner(options("dtypes", data), [])
    inputs: Sequence[Path] = [data] * 3
    with pytest.raises(bench.Stop):
        runner.run(trials, inputs)
    saved = bench.read_results(data.parent)
    assert [(r["name"], r["state"]) for r in saved] == [
        ("float32", "complete"), ("bfloat16", "stopped")
    ]  # fmt: skip
    assert not runner.folder(trials[0]).exists() and runner.folder(trials[1]).exists()
    runner.run(trials, inputs)
    assert started == [["float32", "bfloat16", "fp8"], ["bfloat16", "fp8"]]
    assert runner.failed and "error: bfloat16: exit code 1" in capsys.readouterr().out


def test_pictures_and_tables_of_unfinished_runs(data) -> None:
    trials = bench.sweep_trials(options("sweep", data))
    results = [result(trial, 3.0 + i) for i, trial in enumerate(trials)]
    bench.draw(results, data / "sweep.png")
    race = bench.race_trials(options("race", data), results)
    nothing = {"val_loss": None, "val_bpb": None, "last_val_loss": None, "best_step": None}
    found = [result(race[0], 3.0), result(race[1], 3.0, curve=[], state="stopped", **nothing)]
    bench.draw(found, data / "race.png")
    assert f"{found[1]['steps']:,} of {found[1]['steps']:,}, stopped |" in bench.table(found)
    assert json.loads(json.dumps(found)) == found
    assert (data / "sweep.png").exists() and (data / "race.png").exists()
