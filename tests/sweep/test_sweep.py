"""`gptforge sweep` as a whole. Most trials run in this process, which is faster."""

import csv
import dataclasses
import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gptforge import cli
from gptforge.cli.parsing import parse_train_args
from gptforge.cli.sweep import SweepConfig, _resolver
from gptforge.config import Config
from gptforge.config_file import read_toml
from gptforge.data.dataset import Dataset, DatasetOptions, open_dataset
from gptforge.data.token_dataset import ShardWriter
from gptforge.report import run_report
from gptforge.report.run_info import SWEEP_DATA
from gptforge.sweep import scheduler
from gptforge.sweep.scheduler import Run
from gptforge.sweep.text import prepare_text
from tests import programs
from tests.conftest import play_text

TINY = (
    "--preset", "debug", "--device", "cpu", "--n_layer", "1", "--n_embd", "16", "--max_steps", "4",
    "--eval_every", "2", "--sample_every", "0", "--input", "play.txt", "--out_dir", "sweep",
)  # fmt: skip
GRID = ("--grid", "max_lr=1e-3,1e-2")


class Finished:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code

    wait = poll

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def started(monkeypatch) -> list[Run]:
    """Train in this process, and list what was trained."""
    runs: list[Run] = []

    def start(run: Run, *, device: str, jobs: int) -> Finished:
        runs.append(run)
        return Finished(cli.main(["train", f"--device={device}", *run.args]))

    monkeypatch.setattr(scheduler, "start_process", start)
    # The curves of each run take longer than its steps.
    monkeypatch.setattr(run_report, "save_curves", lambda *args, **kwargs: None)
    return runs


def rows(folder: str = "sweep") -> list[dict[str, str]]:
    with Path(folder, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def val_losses(run: Path) -> dict[int, float]:
    """Held-out loss by step."""
    return {e["step"]: e["val_loss"] for e in programs.events(run) if e["event"] == "eval"}


def test_the_default_folder_is_named_as_that_of_a_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def folder(name: str) -> str:
        argv = ["--preset", "debug", "--input", name]
        args, explicit = parse_train_args(argv, cls=SweepConfig)
        return _resolver(args, explicit, "grid")({})[0].out_dir

    assert folder("texts/*.txt") == folder("bundled:input.txt") == folder("") == "sweeps/debug"
    assert folder("my play.txt") == "sweeps/my-play-debug"
    Path("sweeps/my play-debug").mkdir(parents=True)  # of an earlier version
    assert folder("my play.txt") == "sweeps/my play-debug"


def test_a_sweep_ranks_trials_and_the_same_command_skips_finished_ones(
    program, play, started
) -> None:
    done = program("sweep", *TINY, *GRID, "--seeds", "2")
    assert done.code == 0, done.err
    assert [run.seed for run in started] == [1337, 1338, 1337, 1338]
    first, second = started[0].trial, started[2].trial
    ranked = rows()
    losses = [float(row["val_loss"]) for row in ranked]
    assert len(losses) == 2 and losses == sorted(losses)
    assert f"Best: trial {ranked[0]['trial']}, max_lr=" in done.out
    assert Path("sweep/sweep.png").exists()
    # One step for all seeds: where their mean is lowest.
    evals = [val_losses(Path(f"sweep/trial-{first}{suffix}")) for suffix in ("", "-seed-1338")]
    means = [(evals[0][step] + evals[1][step]) / 2 for step in (2, 4)]
    row = next(row for row in ranked if row["trial"] == first)
    assert float(row["val_loss"]) == pytest.approx(min(means), abs=1e-6)

    started.clear()
    assert program("sweep", *TINY, *GRID, "--seeds", "2").code == 0
    assert started == [] and rows() == ranked
    # More values and seeds: only what is new is trained.
    more = ("--grid", "max_lr=5e-3,1e-2", "--seeds", "3")
    assert program("sweep", *TINY, *more).code == 0
    assert [run.seed for run in started] == [1337, 1338, 1339, 1339]
    assert started[0].trial not in (first, second) and started[3].trial == second


def test_a_trial_that_its_time_limit_ended_trains_on_with_a_longer_one(
    program, play, started
) -> None:
    def num_started(limit: float) -> int:
        started.clear()
        assert program("sweep", *TINY, "--grid", "max_lr=1e-2", "--time_limit", limit).code == 0
        return len(started)

    assert num_started(5) == 1
    metrics = started[0].folder / "metrics.jsonl"
    limited = metrics.read_text().replace('"reason": "finished"', '"reason": "time_limit"')
    for limit, count in ((5, 0), (4, 0), (6, 1), (0, 1)):
        metrics.write_text(limited)
        assert num_started(limit) == count


def test_a_swept_field_without_effect_is_noted(program, play, started) -> None:
    done = program("sweep", *TINY, "--grid", "optimizer=adamw,muon", "muon_lr=0.01")
    (note,) = [line for line in done.out.splitlines() if line.startswith("note: trial ")]
    assert note.startswith(f"note: trial {started[0].trial}: --muon_lr has no effect")


def test_trials_do_not_depend_on_the_test_tail(program, play, started) -> None:
    text = play_text()
    cut = int(0.9 * len(text))
    assert program("sweep", *TINY, *GRID).code == 0
    # Other text with the same characters.
    Path("play.txt").write_text(text[:cut] + text[cut:][::-1])
    assert program("sweep", *TINY, *GRID, "--out_dir", "other").code == 0
    data = [
        [path.read_bytes() for path in sorted(Path(folder, SWEEP_DATA).glob("*.bin"))]
        for folder in ("sweep", "other")
    ]
    assert data[0] == data[1] != []
    assert [row["val_loss"] for row in rows()] == [row["val_loss"] for row in rows("other")]


def test_documents_of_the_test_tail_are_left_out(tmp_path) -> None:
    # By hash, so they are spread over the file, and the rule holds none out a second time.
    lines = [json.dumps({"text": f"Document {i}, {i * 7 % 41}."}) for i in range(300)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    dataset = open_dataset(
        tmp_path / "docs.jsonl", DatasetOptions(tokenizer="byte", val_fraction=0.2)
    )
    _, flags = prepare_text(tmp_path, dataset)
    options = DatasetOptions(tokenizer=flags["tokenizer"], val_fraction=0.2, require_tokenizer=True)
    trial = open_dataset(Path(flags["input"]), options)
    expected = dataset.train[: len(dataset.train)].tolist()
    found = [*trial.train[: len(trial.train)], *trial.val[: len(trial.val)]]
    assert found == expected
    assert len(trial.val) == pytest.approx(0.2 * len(expected), abs=1)
    assert trial.tokenizer.prepends_eot


def texts_of(dataset: Dataset, split: str) -> list[bytes]:
    """The documents of a split, in order."""
    tokens = getattr(dataset, split)
    text = bytes(tokens[: len(tokens)].astype(np.uint16).clip(0, 255).tolist())
    return text.split(b"\xff")[1:]


@pytest.mark.parametrize(("count", "different"), [(30, 27), (300, 100)], ids=["few", "many"])
@pytest.mark.parametrize("as_shards", [False, True], ids=["texts", "shards"])
def test_copies_of_a_document_are_on_one_side_of_the_second_split(
    tmp_path, count, different, as_shards
) -> None:
    copies, start = [i % different for i in range(count - different)], 2 * different // 3
    numbers = [*range(start), *copies, *range(start, different)]
    texts = [f"Document {i}, {i * 7 % 41}." for i in numbers]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = DatasetOptions(tokenizer="byte", val_fraction=0.2)
    dataset = open_dataset(path, options)
    if as_shards:  # of another program, with the end-of-text token after each document
        writer = ShardWriter(tmp_path / "docs.bin", np.dtype(np.uint16))
        ids = [number for text in texts for number in (*text.encode(), 256)]
        writer.write(np.array(ids, np.uint16))
        writer.close()
        options = dataclasses.replace(options, tokenizer=dataset.tokenizer, require_tokenizer=True)
        dataset = open_dataset(tmp_path / "docs.bin", options)
    name, flags = prepare_text(tmp_path, dataset)
    options = dataclasses.replace(options, tokenizer=flags["tokenizer"], require_tokenizer=True)
    trial = open_dataset(Path(flags["input"]), options)
    train, val = (texts_of(trial, split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(dataset.train) == len(trial.train) + len(trial.val)
    assert 0.05 * len(dataset.train) < len(trial.val) < 0.4 * len(dataset.train)
    # The same command finds the files that it wrote.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / name).iterdir()}
    assert prepare_text(tmp_path, dataset) == (name, flags)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / name).iterdir()} == written


def test_a_sweep_of_an_earlier_version_keeps_its_second_split(tmp_path) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Document {i % 50}."}) for i in range(300)))
    dataset = open_dataset(path, DatasetOptions(tokenizer="byte"))
    name, flags = prepare_text(tmp_path, dataset)
    assert Path(flags["input"]) == tmp_path / name
    (tmp_path / f"{name}.bin").touch()
    assert prepare_text(tmp_path, dataset)[1]["input"] == f"{tmp_path.as_posix()}/{name}.bin"


def test_final_trains_the_best_trial_and_quotes_the_test_tail(program, play, started) -> None:
    done = program("sweep", *TINY, *GRID, "--final")
    assert done.code == 0, done.err
    best = rows()[0]
    finals = started[2:]
    assert [run.seed for run in finals] == [1338, 1339, 1340]
    losses = []
    for run in finals:
        text = Path(run.folder, "config.toml").read_text()
        assert 'input = "play.txt"' in text and f"max_lr = {best['max_lr']}" in text
        losses.append(val_losses(run.folder)[int(best["best_step"])])
    assert f"Test split: {sum(losses) / 3:.4f} ± " in done.out
    # Nothing is trained twice, and a trial never reads what final runs do.
    started.clear()
    assert program("sweep", *TINY, *GRID, "--final").code == 0
    assert started == []


def test_a_failed_trial_is_recorded_and_retried(program, play, started, monkeypatch) -> None:
    train = scheduler.start_process

    trials: list[str] = []

    def start(run: Run, **options) -> Finished:
        trials.append(run.trial)
        if len(trials) == 1:
            return train(run, **options)
        run.log.write_text("step 1\nerror: the device ran out of memory\n")
        return Finished(1)

    monkeypatch.setattr(scheduler, "start_process", start)
    done = program("sweep", *TINY, *GRID)
    assert done.code == 0
    assert rows()[1]["error"] == "the device ran out of memory"
    monkeypatch.setattr(scheduler, "start_process", train)
    started.clear()
    assert program("sweep", *TINY, *GRID).code == 0
    assert [run.trial for run in started] == trials[1:]
    assert [row["error"] for row in rows()] == ["", ""]


def test_all_trials_failed(program, play, monkeypatch) -> None:
    def start(run: Run, **options) -> Finished:
        return Finished(9)

    monkeypatch.setattr(scheduler, "start_process", start)
    done = program("sweep", *TINY, *GRID)
    assert done.code == 1
    assert done.err == "error: all trials failed; the first: exit code 9\n"


def test_restart_moves_the_sweep_aside(program, play, started) -> None:
    assert program("sweep", *TINY, "--grid", "max_lr=1e-3").code == 0
    assert program("sweep", *TINY, "--grid", "max_lr=1e-3", "--restart").code == 0
    assert len(started) == 2
    (name,) = {run.folder.name for run in started}
    assert Path("sweep.old-1", name).exists() and Path("sweep", name).exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "give one of --grid, --random and --tpe"),
        ((*GRID, "--tpe", "dropout=0,0.1"), "give one of --grid, --random and --tpe"),
        (("--grid", "max_lrr=1"), "did you mean 'max_lr'?"),
        (("--grid", "max_lr=1e-6"), "trial max_lr=1e-06: --min_lr 0.0001 is more than --max_lr"),
        (("--random", "n_head=3..5"), "is not a multiple of --n_head"),
        (("--tpe", "dropout=0..1"), "--dropout must be"),
        ((*GRID, "--seeds", "0"), "--seeds must be 1 or more"),
        ((*GRID, "--max-lr=1"), "--max_lr and --grid max_lr=... contradict each other"),
        ((*GRID, "--val_fraction", "0"), "give a --val_fraction above 0"),
        (("--grid", "context_length=16,9000", "--block_size", "9000"), "--context_length 9000"),
        ((*GRID, "--out_dir", "."), "not empty and holds no sweep"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(program, play, started, args, words) -> None:
    done = program("sweep", *TINY, *args)
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert words in done.err
    assert started == [] and not Path("sweep/results.csv").exists()


def test_without_optuna_a_search_says_how_to_install_it(
    program, play, started, monkeypatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find_spec(name)
    )
    for method in ("--tpe", "--random"):
        done = program("sweep", *TINY, method, "dropout=0..0.4")
        assert done.code == 2 and "pip install -e '.[sweep]'" in done.err
    assert started == [] and not Path("sweep").exists()


def test_a_tpe_sweep_is_extended_by_more_trials(program, play, started) -> None:
    pytest.importorskip("optuna")
    tpe = ("--tpe", "max_lr=log:1e-3..1e-1", "optimizer=adamw,muon")
    assert program("sweep", *TINY, *tpe, "--trials", "2").code == 0
    assert program("sweep", *TINY, *tpe, "--trials", "3").code == 0
    assert len(started) == len({run.trial for run in started}) == 3
    assert len({row["max_lr"] for row in rows()}) == 3


def test_another_configuration_or_text_has_other_trials(program, play, started) -> None:
    grid = ("--grid", "max_lr=1e-3")
    for change in ((), ("--weight_decay", "1"), ("--max_steps", "5"), ("--log_every", "2")):
        assert program("sweep", *TINY, *change, *grid).code == 0
    assert len(started) == 3  # how often it logs changes nothing
    Path("play.txt").write_text(play_text() * 2)
    assert program("sweep", *TINY, *grid).code == 0
    assert len({run.trial for run in started}) == len(started) == 4
    assert [row["trial"] for row in rows()] == [started[3].trial]


@pytest.mark.parametrize(("free", "jobs"), [(None, 1), (10**9, 1), (3 * 10**9, 2), (10**12, 4)])
def test_jobs_on_a_gpu_are_as_many_as_fit(monkeypatch, free, jobs) -> None:
    estimator = SimpleNamespace(
        micro_batch=lambda explicit: 8,
        memory=lambda sequences: {"weights": 3 * 10**8},
        free_memory=free,
    )
    monkeypatch.setattr(scheduler, "MemoryEstimator", lambda *args: estimator)
    monkeypatch.setattr(scheduler, "select_device", lambda name: (torch.device("cuda"), ""))
    monkeypatch.setattr(scheduler, "select_precision", lambda *args: None)
    assert scheduler.jobs_per_device(Config(), ()) == jobs


def test_runs_take_turns_on_several_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert scheduler.find_devices(Config()) == ["cuda:0", "cuda:1"]
    assert scheduler.find_devices(Config(device="cuda:1")) == ["cuda:1"]
    assert scheduler.find_devices(Config(device="cpu")) == ["cpu"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupted_sweep_saves_its_trials_and_resumes_them(program, play, started) -> None:
    args = ("sweep", *TINY, "--max_steps", "100000", "--grid", "max_lr=1e-3")
    process = programs.start(*args, cwd=Path.cwd())
    deadline = time.monotonic() + 200
    while not list(Path("sweep").glob("*/checkpoints/best")) and time.monotonic() < deadline:
        time.sleep(0.1)
    trial = next(Path("sweep").glob("trial-????????"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "the same command resumes the sweep" in err
    last = programs.events(trial)[-1]
    assert (last["event"], last["reason"]) == ("end", "terminated")

    assert program(*args, "--time_limit", "0.001").code == 0
    names = [event["event"] for event in programs.events(trial)]
    assert "resume" in names and names[-1] == "end"
    assert float(rows()[0]["best_step"]) > 0


@pytest.mark.parametrize("preset", ["auto", "shakespeare-cpu"])
def test_trials_keep_the_recipe_of_the_text(program, play, started, preset) -> None:
    small = [*TINY, "--preset", preset, "--context_length", "32", "--batch_size", "4"]
    done = program("sweep", *small, "--grid", "max_lr=1e-3,1e-2", "--final")
    assert done.code == 0, done.err
    configs = [read_toml(Path(run.folder, "config.toml"))[0] for run in started]
    trials, finals = configs[:2], configs[2:]
    # The recipe goes by the size of the text, which trials see less of; a field that follows
    # from a swept one does so in each trial.
    for name in ("dropout", "weight_decay", "ema", "n_head", "block_size"):
        assert len({config[name] for config in configs}) == 1
    assert [config["min_lr"] for config in trials] == [1e-4, 1e-3]
    assert {config["tokenizer"] for config in finals} == {"char"}
