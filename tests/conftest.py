"""Shared fixtures: a small text, a small model, and the command line in this process."""

import os
import random

# On a busy machine, two OpenMP threads per worker can be fifty times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# cuBLAS reads this once; deterministic runs need it from the first matmul on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Help and tables are as wide as that, in a narrow terminal too.
os.environ["COLUMNS"] = "80"

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib.font_manager
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from gptforge.cli import main
from gptforge.config import GPTConfig
from gptforge.model import GPT
from gptforge.report.log_handler import log_to
from gptforge.training import trainer
from tests.pictures import SAMPLE_TOKENS, blank_curves, blank_report

torch.set_num_threads(1)
# Child processes find the list of fonts: one that searches for long warns on stderr.
os.environ.setdefault("MPLCONFIGDIR", matplotlib.get_cachedir())
# nohup, and shells for background jobs, ignore these signals, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run, and no limit of time: a busy machine must not fail a test.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

TINY = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: a third of the time, tests wait for other processes."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(autouse=True, scope="session")
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep prepared texts of tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in each run of a test, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_matmul() -> None:
    """Undo the TF32 setting of a training run in this process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blank curves and report.html; their own tests override this."""
    monkeypatch.setattr("gptforge.report.curves.plot_curves", blank_curves)
    monkeypatch.setattr("gptforge.report.html_report.render_report", blank_report)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SAMPLE_TOKENS", SAMPLE_TOKENS)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    return torch.device(request.param)


@pytest.fixture
def tiny_model() -> GPT:
    return GPT(TINY).init_weights(torch.Generator().manual_seed(0))


def play_text() -> str:
    """A small text with some structure, about 9,000 characters."""
    lines = [
        f"{'ROMEO' if i % 2 else 'JULIET'}:\nWhat light is {i * 7 % 41} in yonder window?\n\n"
        for i in range(160)
    ]
    return "".join(lines)


@pytest.fixture
def play(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(play_text(), encoding="utf-8")
    return path


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs, in order."""
    logged: list[str] = []
    with log_to(logged.append):
        yield logged


@dataclass
class Outcome:
    """Exit code and output of a call of the program."""

    code: int
    out: str
    err: str


@pytest.fixture
def program(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Call the command line with arguments, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gptforge"])

    def call(*args: object) -> Outcome:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
