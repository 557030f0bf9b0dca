from pathlib import Path

import pytest

from gptforge.data import dataset
from gptforge.data.dataset import resolve_input
from tests.programs import DEBUG


def test_the_text_in_the_working_folder_comes_before_the_packages(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ROMEO" in resolve_input("").read_text(encoding="utf-8").upper()
    Path("input.txt").write_text("mine")
    assert resolve_input("").read_text() == "mine"
    assert resolve_input("other.txt") == Path("other.txt")


@pytest.fixture
def bundled(tmp_path, monkeypatch, play) -> Path:
    """A program that lies in a folder of its own, with a short text."""
    path = tmp_path / "site" / "gptforge" / "data" / "input.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(play.read_bytes())
    monkeypatch.setattr(dataset, "BUNDLED_PATHS", (path,))
    return path


def test_the_bundled_text_is_called_the_same_wherever_the_program_lies(
    program, bundled, tmp_path, monkeypatch
) -> None:
    assert program(*DEBUG, "--max_steps", 2, "--out_dir", "run").code == 0
    for config in (Path("run/config.toml"), *Path("run").glob("checkpoints/*/config.toml")):
        assert 'input = "bundled:input.txt"' in config.read_text()
        assert str(tmp_path) not in config.read_text()
    moved = bundled.parents[3] / "elsewhere" / "input.txt"
    moved.parent.mkdir()
    bundled.rename(moved)
    monkeypatch.setattr(dataset, "BUNDLED_PATHS", (moved,))
    # A text of the user's own does not take its place.
    Path("input.txt").write_text("mine")
    assert program("eval", "run", "--device", "cpu").code == 0
    config = ("--config", "run/config.toml", "--device", "cpu")
    assert program(*config, "--max_steps", 3, "--out_dir", "run").code == 0
    assert program(*config, "--out_dir", "other").code == 0


def test_a_run_of_an_earlier_version_still_finds_the_bundled_text(program, bundled) -> None:
    assert program(*DEBUG, "--max_steps", 2, "--out_dir", "run").code == 0
    config = Path("run/config.toml")
    old = '"/opt/old/lib/gptforge/input.txt"'
    config.write_text(config.read_text().replace('"bundled:input.txt"', old))
    done = program("--config", config, "--device", "cpu", "--max_steps", 3, "--out_dir", "run")
    assert done.code == 0, done.err
    assert "is not here: the text that comes with the program is used" in done.out
    # Named by hand, it is not guessed at.
    done = program(*DEBUG, "--input", "/opt/old/input.txt", "--out_dir", "other")
    assert done.code == 2
    assert "/opt/old/input.txt: there is no such file" in done.err
