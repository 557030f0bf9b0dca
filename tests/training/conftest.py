import dataclasses
from pathlib import Path

import pytest

from gptforge.config import Config
from gptforge.presets import get_preset


@pytest.fixture
def config(play: Path, tmp_path: Path) -> Config:
    return dataclasses.replace(
        get_preset("debug"),
        input=str(play),
        out_dir=str(tmp_path / "run"),
        device="cpu",
        n_layer=1,
        dropout=0.1,
        eval_every=4,
        save_every=6,
        sample_every=0,
        keep_checkpoints=9,
    )
