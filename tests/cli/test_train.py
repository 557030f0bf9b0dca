"""`gptforge train`: what it prints and writes."""

import errno
import gc
import re
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from gptforge import distributed
from gptforge.builders import build_trainer, memory_fit
from gptforge.cli.train import run_training
from gptforge.config import Config
from gptforge.errors import NOTHING_LOST
from gptforge.report.log_handler import WriteHandler
from gptforge.shell import Start
from gptforge.training.train_step import TrainStep
from tests.programs import DEBUG, events, start


def test_the_default_preset_is_explained(program, play) -> None:
    done = program("--device", "cpu", "--input", play, "--max_steps", 2, "--eval_tokens", 200)
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert "shakespeare-cpu" in first
    assert "because" in first
    assert "--preset" in first
    assert any("warmup" in line and "cut to 1" in line for line in rest)
    assert any("this will take about" in line for line in rest)
    assert Path("runs/play-shakespeare-cpu/checkpoints/step-000002").is_dir()


def test_an_interruption_before_training_says_on_every_rank_that_nothing_is_lost(
    monkeypatch, play
) -> None:
    aborted = []

    class Rank:
        def abort(self, error: BaseException) -> None:
            aborted.append(str(error))

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "init_distributed", lambda device: Rank())
    monkeypatch.setattr(build_trainer, "build_trainer", interrupt)
    with pytest.raises(KeyboardInterrupt, match="nothing is lost"):
        run_training(
            Config(preset="debug", input=str(play)), frozenset(), start=Start("gptforge"),
            logging_as=nullcontext(WriteHandler(print)),
        )  # fmt: skip
    assert aborted == [NOTHING_LOST]


@pytest.mark.parametrize("where", ["", "start_report", "step"])
def test_training_ends_its_threads_without_the_garbage_collector(
    program, play, monkeypatch, where
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if where == "step":
        monkeypatch.setattr(TrainStep, "__call__", fail)
    elif where:
        monkeypatch.setattr(build_trainer, where, fail)
    before = set(threading.enumerate())
    gc.disable()
    try:
        assert program(*DEBUG, "--input", play, "--out_dir", "run").code == (1 if where else 0)
        for thread in set(threading.enumerate()) - before:
            thread.join(timeout=120)
            assert not thread.is_alive(), thread
    finally:
        gc.enable()


def test_a_failed_gpu_is_one_line_that_says_how_to_resume(program, play, monkeypatch) -> None:
    step = TrainStep.__call__

    def fail_at_the_fourth(self: TrainStep, *args: torch.Tensor, lr: float) -> object:
        steps.append(lr)
        if len(steps) == 4:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nFor debugging")
        return step(self, *args, lr=lr)

    steps: list[float] = []
    monkeypatch.setattr(TrainStep, "__call__", fail_at_the_fourth)
    flags = (*DEBUG, "--input", play, "--out_dir", "run", "--save_every", 2)
    failed = program(*flags)
    assert failed.code == 1
    line = failed.err.splitlines()[-1]
    assert line.startswith("error: the GPU failed: CUDA error: unspecified launch failure; ")
    assert "the same command" in line and "For debugging" not in failed.err
    resumed = program(*flags)
    assert resumed.code == 0
    assert "Resuming from step-000002" in resumed.out


def test_a_run_writes_all_its_files(program, play) -> None:
    done = program(*DEBUG, "--input", play, "--out_dir", "run")
    assert done.code == 0, done.err
    assert done.err == ""
    logs = ("log.md", "metrics.jsonl", "samples.md", "training_curves.png", "report.html")
    for name in ("config.toml", *logs):
        assert (Path("run") / name).stat().st_size > 0, name
    lines = re.findall(
        r"^step \d+ \| loss: \d+\.\d{4} \| dt: \d+\.\d{2}ms \| tok/sec: \d+\.\d{2} \| "
        r"norm: \d+\.\d{2} \| lr: \d\.\d{6}$",
        done.out,
        re.MULTILINE,
    )
    assert len(lines) == 20
    log = Path("run/log.md").read_text(encoding="utf-8")
    assert all(line in log for line in lines)
    assert "Total Parameters:" in log
    assert "\x1b" not in done.out + log
    assert {event["event"] for event in events()} == {"start", "train", "eval", "save", "end"}
    assert "Best held-out loss" in log

    # config.toml starts the same run again, also after --restart: it is finished.
    assert program(*DEBUG, "--input", play, "--out_dir", "run", "--restart=true").code == 0
    again = program("--config", "run/config.toml")
    assert again.code == 0
    assert "is finished" in again.out


def test_the_epochs_that_are_announced_are_those_at_the_end(program, tmp_path) -> None:
    (tmp_path / "short.txt").write_text("a quick fox and a lazy dog\n" * 12)
    flags = ("--input", "short.txt", "--random_offset", "true", "--max_steps", 10)
    done = program(*DEBUG, *flags, "--sample_every", 0)
    announced = re.search(r"about ([\d.]+) epochs", done.out)
    assert announced and f", epoch {announced[1]}." in done.out


def test_flags_without_effect_are_named(program, play) -> None:
    flags = (*DEBUG, "--input", play, "--max_steps", 2, "--sample_every", 0)
    unused = ("--muon_lr", 0.1, "--teacher_steps", 2, "--decay_fraction", 0.5)
    unused = (*unused, "--dropout_ramp", 0.5)
    done = program(*flags, *unused, "--out_dir", "a")
    notes = [line for line in done.out.splitlines() if "has no effect" in line]
    assert notes == [
        "note: --muon_lr has no effect without --optimizer muon",
        "note: --teacher_steps has no effect without --teachers",
        "note: --dropout_ramp has no effect without --dropout",
        "note: --decay_fraction has no effect without --schedule wsd",
    ]
    used = ("--optimizer", "muon", "--teachers", 1, "--schedule", "wsd", "--dropout", 0.1)
    assert "has no effect" not in program(*flags, *unused, *used, "--out_dir", "b").out
    done = program(*flags, "--schedule", "constant", "--min_lr", 1e-5, "--out_dir", "c")
    assert "--min_lr has no effect with --schedule constant" in done.out


def test_two_processes_cannot_train_in_one_folder(tmp_path, play, program) -> None:
    command = (*DEBUG, "--input", play, "--out_dir", tmp_path / "run", "--max_steps", 10**6)
    process = start(*command, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3 "):
            break
    second = program(*command)
    process.kill()
    process.wait(timeout=120)
    process.stdout.close()
    assert second.code == 2
    assert "another process" in second.err


@pytest.mark.parametrize(
    ("free_bytes", "flags", "words"),
    [
        (10**9, ("--batch_size", 10**6), r"--batch_size 1000000 .* [\d.]+ GB"),
        (10**4, (), "memory"),
    ],
)
def test_too_little_memory_is_found_before_the_model_is_built(
    program, play, monkeypatch, free_bytes, flags, words
) -> None:
    monkeypatch.setattr(memory_fit, "usable_memory", lambda device: free_bytes)
    done = program(*DEBUG, "--input", play, "--out_dir", "run", *flags)
    assert done.code == 2
    assert re.search(words, done.err)
    assert not Path("run/log.md").exists()
