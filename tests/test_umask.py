"""Files and folders that the program writes have the mode that the user's umask allows."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest

from gptforge.sweep.space import STORAGE, Range, optuna_search
from tests.programs import DEBUG

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
SHORT = (*DEBUG, "--max_steps", 4, "--save_every", 2)


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """The folder that all output goes to, and that also holds the caches."""
    folder = tmp_path / "made"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


def write_all(program, play: Path) -> None:
    """Call the commands that write files."""
    commands = [
        (*SHORT, "--input", play, "--tokenizer", "bpe", "--out_dir", "made/run"),
        ("tokenizer", "train", play, "--vocab_size", 300, "--out", "made/own.json"),
        ("prepare", play, "--out", "made/shards", "--tokenizer", "made/own.json"),
        ("prepare", play, "--out", "made/raw", "--tokenizer", "byte", "--raw_bin"),
        ("export", "made/run", "--to", "space", "made/space"),
        ("export", "made/run", "--to", "hf", "made/hf"),
        ("export", "made/run", "--to", "gguf", "made/gguf"),
        ("import", "made/hf", "made/import"),
        ("--resume", "made/run", "--max_steps", 6),
    ]
    for command in commands:
        done = program(*command)
        assert done.code == 0, done.err


@pytest.mark.parametrize("mask", [0o002, 0o022])
def test_new_files_follow_the_umask(program, play, made, mask) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    previous = os.umask(mask)
    try:
        write_all(program, play)
    finally:
        os.umask(previous)
    paths = [path for path in (made, *made.rglob("*")) if not path.is_symlink()]
    assert len(paths) > 100
    assert unexpected_modes(paths, mask) == {}


def unexpected_modes(paths: Iterable[Path], mask: int) -> dict[Path, str]:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths}
    return {
        path: oct(mode)
        for path, mode in modes.items()
        if mode != (0o777 if path.is_dir() else 0o666) & ~mask
    }


def test_database_of_a_search_follows_the_umask(tmp_path) -> None:
    pytest.importorskip("optuna", reason="optuna is not installed")
    previous = os.umask(0o002)
    try:
        search = optuna_search(
            {"max_lr": Range(1e-4, 1e-2, is_log=True, is_int=False)}, "random",
            seed=1, trials=1, study="s", folder=tmp_path, losses=dict,
        )  # fmt: skip
        assert len(list(search)) == 1
    finally:
        os.umask(previous)
    assert unexpected_modes([tmp_path / STORAGE], 0o002) == {}
