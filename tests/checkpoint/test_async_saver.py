import os
import threading
from pathlib import Path

import pytest
import torch

from gptforge.checkpoint.async_saver import AsyncSaver, SavedCheckpoint
from gptforge.checkpoint.store import (
    MODEL,
    CheckpointStore,
    Snapshot,
    find_corruption,
    read_tensors,
)
from gptforge.errors import RunError
from gptforge.tokenizers.char import CharTokenizer


class SlowStore(CheckpointStore):
    """Saves when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go = threading.Event()

    def save(self, *args, **kwargs) -> str:
        assert self.go.wait(timeout=60)
        return super().save(*args, **kwargs)


def snapshot(value: float, device: torch.device | str = "cpu") -> Snapshot:
    tensor = torch.full((4, 4), value, device=device)
    return Snapshot({"w": tensor}, {"w.exp_avg": tensor.clone()}, {"cpu": torch.zeros(1)}, {})


def make(store: CheckpointStore, keep: int = 0) -> AsyncSaver:
    return AsyncSaver(store, tokenizer=CharTokenizer("ab"), config="", keep=keep)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path) -> None:
    store = SlowStore(tmp_path)
    saver = make(store)
    saver.save_async(1, snapshot(1.0), is_best=True)
    # It came back though nothing is written; no pointer leads to what is not there.
    assert saver.poll() == []
    assert store.read_link("last") is None
    assert store.read_link("best") is None
    store.go.set()
    saver.wait()
    assert saver.poll() == [SavedCheckpoint(1, "step-000001", True)]
    assert saver.poll() == []
    assert store.read_link("best") == store.read_link("last") == tmp_path / "step-000001"
    assert find_corruption(tmp_path / "step-000001") is None


def test_saves_follow_each_other_and_prune_what_is_not_kept(tmp_path, device) -> None:
    store = CheckpointStore(tmp_path)
    saver = make(store)
    for step in range(1, 5):
        saver.save_async(step, snapshot(step, device), is_best=step == 2)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1, 2, 3, 4]
    assert [path.name for path in store.checkpoints()] == ["step-000002", "step-000004"]
    assert read_tensors(tmp_path / "step-000004", MODEL)["w"].eq(4).all()


def test_a_save_that_fails_is_heard_of_and_what_was_there_stays(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    saver = make(store)
    saver.save_async(1, snapshot(1.0), is_best=True)
    saver.wait()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptforge.checkpoint.store.write_tensors", no_space)
    saver.save_async(2, snapshot(2.0), is_best=True)
    with pytest.raises(RunError, match="disk filled up"):
        saver.wait()
    assert store.read_link("best") == store.read_link("last") == tmp_path / "step-000001"
    assert [path.name for path in store.checkpoints()] == ["step-000001"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (28, "last: the disk filled up while saving step-000002: step-000002 is kept: make room, "
         "and the same command goes on from there"),
        (5, "last: Input/output error while saving step-000002: step-000002 is kept: mend the "),
    ],
)  # fmt: skip
def test_an_error_behind_a_save_says_what_is_kept_and_how_to_go_on(
    tmp_path, monkeypatch, number, words
) -> None:
    saver = make(CheckpointStore(tmp_path))
    saver.save_async(1, snapshot(1.0), is_best=False)
    saver.wait()

    def refused(link, target) -> None:
        raise OSError(number, os.strerror(number), str(link))

    monkeypatch.setattr("gptforge.files.point", refused)
    saver.save_async(2, snapshot(2.0), is_best=False)
    with pytest.raises(RunError, match=words):
        saver.wait()


def test_a_full_disk_is_said_before_the_save_begins(tmp_path, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(RunError, match="make room"):
        make(CheckpointStore(tmp_path)).save_async(1, snapshot(1.0), is_best=False)
