"""A run that trains meanwhile: `best` moves to another checkpoint, and the old one is deleted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptforge.builders import export_model, load_model, run_evaluation
from gptforge.builders.load_model import load_saved
from gptforge.checkpoint import format as checkpoints
from gptforge.files import set_link

OLD, NEW = "step-000012", "step-000020"


@pytest.fixture
def training(run: str) -> Callable[[], None]:
    """`best` is the older of two checkpoints, until this is called."""
    folder = Path(run, "checkpoints")
    set_link(folder / "best", OLD)

    def train_on() -> None:
        set_link(folder / "best", NEW)
        shutil.rmtree(folder / OLD, ignore_errors=True)

    return train_on


def call_before(monkeypatch, module, name: str, action: Callable[[], None]) -> None:
    function = getattr(module, name)

    def call(*args, **kwargs):
        action()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("name", ["", "checkpoints/best"])
def test_an_export_is_of_one_checkpoint(run, training, monkeypatch, tmp_path, name) -> None:
    old = load_saved(f"{run}/checkpoints/{OLD}").bundle.state_dict
    call_before(monkeypatch, export_model, "check_finite", training)
    export_model.export_space(str(Path(run, name)), tmp_path / "space")
    assert (tmp_path / "space/checkpoints/best").resolve().name == OLD
    written = load_saved(tmp_path / "space").bundle.state_dict
    assert all(torch.equal(tensor, written[name]) for name, tensor in old.items())
    assert "| Steps | 12 of 20, " in (tmp_path / "space/README.md").read_text(encoding="utf-8")


def test_an_evaluation_is_of_one_checkpoint(run, training, monkeypatch) -> None:
    expected = run_evaluation.evaluate_run(f"{run}/checkpoints/{OLD}")
    call_before(monkeypatch, run_evaluation, "language_model", training)
    assert run_evaluation.evaluate_run(run) == expected


def test_the_newer_checkpoint_is_read_if_the_older_one_is_deleted(
    run, training, monkeypatch
) -> None:
    call_before(monkeypatch, load_model.checkpoints, "read_tokenizer", training)
    saved = load_saved(run, with_state=True)
    assert saved.path.name == NEW and saved.state["progress"]["step"] == 20
    assert saved.state == checkpoints.read_state(saved.path)


def test_the_link_to_a_checkpoint_is_followed_once(run) -> None:
    best = Path(run, "checkpoints/best")
    resolved = checkpoints.resolve_checkpoint(best.as_posix())
    assert resolved == best.resolve() and not resolved.is_symlink()
    link = Path(run, "mine")
    link.symlink_to("checkpoints/best")
    assert checkpoints.resolve_checkpoint(link.as_posix()) == best.resolve()
