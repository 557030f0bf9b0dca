import dataclasses
import shutil
from pathlib import Path

import pytest

from gptforge.presets import get_preset
from tests.training.conftest import config as config
from tests.training.runs import build


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A run of 20 steps, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [
        f"{'ROMEO' if i % 2 else 'JULIET'}:\nWhat light is {i * 7 % 41} in yonder window?\n\n"
        for i in range(160)
    ]
    (folder / "play.txt").write_text("".join(lines), encoding="utf-8")
    files = {"input": str(folder / "play.txt"), "out_dir": str(folder / "run"), "device": "cpu"}
    cadence = {"eval_every": 4, "save_every": 6, "sample_every": 0, "keep_checkpoints": 9}
    build(dataclasses.replace(get_preset("debug"), dropout=0.1, **files, **cadence)).fit()
    return folder / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> str:
    """A copy of `trained_run` at tmp_path / "run"."""
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    return str(tmp_path / "run")
