import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

from gptforge.checkpoint.async_saver import AsyncSaver, SavedCheckpoint
from gptforge.checkpoint.format import MODEL, Snapshot, find_corruption, read_tensors
from gptforge.checkpoint.store import CheckpointStore
from gptforge.errors import RunError
from gptforge.tokenizers.char import CharTokenizer


def snapshot(value: float, device: torch.device | str = "cpu") -> Snapshot:
    tensor = torch.full((4, 4), value, device=device)
    return Snapshot({"w": tensor}, {"w.exp_avg": tensor.clone()}, {"cpu": torch.zeros(1)}, {})


def make_saver(store: CheckpointStore, **options: bool) -> AsyncSaver:
    return AsyncSaver(store, tokenizer=CharTokenizer("ab"), config="", keep=0, **options)


def test_training_continues_while_a_checkpoint_is_saved(tmp_path, monkeypatch) -> None:
    store, may_save = CheckpointStore(tmp_path), threading.Event()
    save = store.save

    def wait_and_save(*args, **options) -> str:
        assert may_save.wait(timeout=120)
        return save(*args, **options)

    monkeypatch.setattr(store, "save", wait_and_save)
    saver = make_saver(store)
    saver.save_async(1, snapshot(1.0), is_best=True)
    assert saver.poll() == []
    assert store.read_link("last") is store.read_link("best") is None
    may_save.set()
    saver.wait()
    assert saver.poll() == [SavedCheckpoint(1, "step-000001", True)]
    assert saver.poll() == []
    assert store.read_link("best") == store.read_link("last") == tmp_path / "step-000001"
    assert find_corruption(tmp_path / "step-000001") is None


def test_a_save_that_ctrl_c_stops_waiting_for_is_waited_for_again(tmp_path, monkeypatch) -> None:
    """Or `close` would unlock the run folder while it is written."""
    store, may_save = CheckpointStore(tmp_path), threading.Event()
    save = store.save

    def wait_and_save(*args, **options) -> str:
        assert may_save.wait(timeout=120)
        return save(*args, **options)

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save", wait_and_save)
    saver = make_saver(store)
    saver.save_async(1, snapshot(1.0), is_best=True)
    with monkeypatch.context() as patch:
        # A real signal would be lost if it came just before the wait began.
        patch.setattr("gptforge.checkpoint.async_saver.futures.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            saver.wait()
    may_save.set()
    saver.wait()
    assert saver.poll() == [SavedCheckpoint(1, "step-000001", True)]


def test_saves_run_one_by_one_and_prune(tmp_path, device) -> None:
    store = CheckpointStore(tmp_path)
    saver = make_saver(store)
    for step in range(1, 5):
        saver.save_async(step, snapshot(step, device), is_best=step == 2)
    saver.wait()
    assert [saved.step for saved in saver.poll()] == [1, 2, 3, 4]
    assert [path.name for path in store.checkpoints()] == ["step-000002", "step-000004"]
    assert read_tensors(tmp_path / "step-000004", MODEL)["w"].eq(4).all()


def test_disabled_saver_saves_nothing(tmp_path) -> None:
    saver = make_saver(CheckpointStore(tmp_path), enabled=False)
    saver.save_async(1, snapshot(1.0), is_best=True)
    saver.wait()
    assert saver.poll() == [] and not any(tmp_path.iterdir())


def test_failed_save_raises_and_keeps_what_was_there(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path)
    saver = make_saver(store)
    saver.save_async(1, snapshot(1.0), is_best=True)
    saver.wait()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gptforge.checkpoint.format.save_safetensors", no_space)
    saver.save_async(2, snapshot(2.0), is_best=True)
    with pytest.raises(RunError, match="the disk is full"):
        saver.wait()
    assert store.read_link("best") == store.read_link("last") == tmp_path / "step-000001"
    assert [path.name for path in store.checkpoints()] == ["step-000001"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (28, "last: the disk is full, while saving step-000002: step-000002 is kept: free some "
         "space, and the same command resumes from it"),
        (5, "last: input/output error, while saving step-000002: step-000002 is kept: check the "),
    ],
)  # fmt: skip
def test_error_after_a_save_says_what_is_kept_and_how_to_resume(
    tmp_path, monkeypatch, number, message
) -> None:
    saver = make_saver(CheckpointStore(tmp_path))
    saver.save_async(1, snapshot(1.0), is_best=False)
    saver.wait()

    def refuse(link: Path, target: str) -> None:
        raise OSError(number, os.strerror(number), str(link))

    monkeypatch.setattr("gptforge.files.set_link", refuse)
    saver.save_async(2, snapshot(2.0), is_best=False)
    with pytest.raises(RunError, match=message):
        saver.wait()


def test_full_disk_is_reported_before_the_save_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(RunError, match="free some space"):
        make_saver(CheckpointStore(tmp_path)).save_async(1, snapshot(1.0), is_best=False)
