import shutil
from pathlib import Path

import pytest

from gptforge.cli import main
from tests.conftest import play_text
from tests.programs import DEBUG


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the debug preset."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "play.txt").write_text(play_text(), encoding="utf-8")
    flags = ("--input", str(folder / "play.txt"), "--out_dir", str(folder / "run"))
    assert main([*DEBUG, *flags, "--eval_tokens", "0"]) == 0
    return folder / "run"


@pytest.fixture
def run(shared_run: Path, program, tmp_path: Path) -> Path:
    """A copy of it that a test may change, called `run` in the working folder."""
    shutil.copytree(shared_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
