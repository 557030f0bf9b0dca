import json
import shutil
from pathlib import Path

import pytest
import torch

from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint import store as store_module
from gptforge.checkpoint.format import (
    CHECKPOINT_FILES,
    Snapshot,
    find_corruption,
    resolve_checkpoint,
)
from gptforge.checkpoint.store import CheckpointStore
from gptforge.errors import RunError, UserError
from gptforge.tokenizers.char import CharTokenizer


def save(store: CheckpointStore, step: int) -> Path:
    snapshot = Snapshot(
        model={"weight": torch.full((3, 4), float(step))},
        optimizer={"weight.exp_avg": torch.zeros(3, 4)},
        rng_state={"cpu": torch.get_rng_state()},
        state={"progress": {"step": step}},
    )
    name = store.save(step, snapshot, tokenizer=CharTokenizer("abc"), config="n_layer = 9\n")
    return store.folder / name


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    (tmp_path / "run").mkdir()
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def test_saved_checkpoint_is_intact_and_last(store) -> None:
    path = save(store, 250)
    assert path.name == "step-000250"
    assert find_corruption(path) is None
    assert store.read_link("last") == path
    assert store.read_link("best") is None
    names = sorted(entry.name for entry in path.iterdir())
    assert names == sorted([*CHECKPOINT_FILES, "manifest.json"])
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert listed["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size
    with pytest.raises(UserError, match="describes a model of"):
        checkpoints.read_config(path)
    assert checkpoints.read_tokenizer(path).vocab_size == 3
    assert checkpoints.read_tensors(path, checkpoints.MODEL)["weight"].eq(250).all()


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_any_corruption_of_any_file_is_found(store, name, how) -> None:
    file = save(store, 1) / name
    raw = file.read_bytes()
    if how == "flip":
        file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif how == "truncate":
        file.write_bytes(raw[:-1] if name != "manifest.json" else raw[: len(raw) // 2])
    else:
        file.unlink()
    assert find_corruption(store.folder / "step-000001") is not None


def test_saving_a_step_again_replaces_it(store) -> None:
    save(store, 3)
    path = save(store, 3)
    assert store.checkpoints() == [path]
    assert find_corruption(path) is None


def test_crash_while_a_step_is_replaced_loses_neither(store) -> None:
    path = save(store, 3)
    path.rename(store.folder / f".{path.name}.replaced")
    assert store.latest() == (path, [])
    path.rename(store.folder / f".{path.name}.replaced")
    save(store, 3)
    assert store.latest() == (path, [])
    assert not list(store.folder.glob(".*"))


def test_corrupt_checkpoint_is_renamed_and_the_previous_one_used(store) -> None:
    first, second = save(store, 1), save(store, 2)
    (second / "model.safetensors").write_bytes(b"nothing")
    found, warnings = store.latest()
    assert found == first
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    assert (store.folder / "step-000002.damaged-1").is_dir()
    assert store.latest() == (first, [])


def test_without_an_intact_checkpoint_nothing_is_renamed(store) -> None:
    # An exported Space has no optimizer, and its page finds the weights by name.
    path = save(store, 1)
    (path / "optimizer.safetensors").unlink()
    assert store.latest() == (None, ["step-000001 is damaged (optimizer.safetensors is missing)"])
    assert store.checkpoints() == [path]
    assert find_corruption(path, checkpoints.INFERENCE_FILES) is None


def test_interrupted_save_leaves_what_was_there(store, monkeypatch) -> None:
    first = save(store, 1)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.files, "atomic_write", crash)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    assert store.checkpoints() == [first]
    assert store.read_link("last") == first
    assert find_corruption(first) is None
    assert not list(store.folder.glob(".*"))


def test_full_disk_is_noticed_before_the_save(store, monkeypatch) -> None:
    first = save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    with pytest.raises(RunError, match="step-000001 is kept"):
        save(store, 2)
    assert store.latest() == (first, [])


def test_file_system_that_does_not_know_its_size_is_not_full(store, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    first = save(store, 1)
    assert store.latest() == (first, [])


def test_disk_that_fills_up_while_saving_keeps_the_last_checkpoint(store, monkeypatch) -> None:
    first = save(store, 1)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_safetensors", no_space)
    with pytest.raises(RunError, match=r"disk is full.*step-000001 is kept"):
        save(store, 2)
    assert store.latest() == (first, [])


@pytest.mark.parametrize("is_writing", [False, True])
def test_save_into_a_run_folder_that_is_gone_starts_a_new_one(
    store, monkeypatch, messages, is_writing
) -> None:
    run, moved = store.folder.parent, store.folder.parent.with_name("moved")
    save(store, 1)
    write = checkpoints.save_safetensors

    def move_and_write(*args: object) -> None:
        if not moved.exists():
            run.rename(moved)
        write(*args)

    if is_writing:
        monkeypatch.setattr(checkpoints, "save_safetensors", move_and_write)
    else:
        run.rename(moved)
    second = save(store, 2)
    assert store.latest() == (second, [])
    assert store.read_link("last") == second
    # What `--resume` reads.
    assert (run / "config.toml").read_text() == (second / "config.toml").read_text()
    assert [line for line in messages if "was moved or deleted" in line] == messages
    assert find_corruption(moved / "checkpoints" / "step-000001") is None


@pytest.mark.parametrize(("keep", "left"), [(0, [2, 5]), (1, [2, 4, 5]), (2, [2, 3, 4, 5])])
def test_pruning_spares_best_and_last(store, keep, left) -> None:
    for step in range(1, 6):
        save(store, step)
    store.set_link("best", "step-000002")
    store.prune(keep)
    assert [int(path.name[5:]) for path in store.checkpoints()] == left


def test_pruning_spares_protected_steps(store) -> None:
    for step in range(1, 6):
        save(store, step)
        store.prune(1, {2, None})
    assert [int(path.name[5:]) for path in store.checkpoints()] == [2, 4, 5]


def test_pruning_ignores_a_checkpoint_that_somebody_else_deletes(store, monkeypatch) -> None:
    for step in range(1, 4):
        save(store, step)
    rename = Path.rename

    def delete_and_rename(path: Path, target: Path) -> Path:
        shutil.rmtree(store.path_of(1), ignore_errors=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", delete_and_rename)
    store.prune(0)
    assert [int(path.name[5:]) for path in store.checkpoints()] == [3]


def test_run_resolves_to_its_best_checkpoint(store) -> None:
    run = store.folder.parent
    first, second = save(store, 1), save(store, 2)
    assert resolve_checkpoint(str(run)) == second
    store.set_link("best", first.name)
    assert resolve_checkpoint(str(run)) == first
    assert resolve_checkpoint(str(second)) == second


def test_path_without_a_checkpoint_is_refused_with_a_hint(store, tmp_path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        resolve_checkpoint(str(tmp_path))
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        resolve_checkpoint(str(tmp_path / "missing"))
    latest = save(store, 3)
    assert resolve_checkpoint(str(store.folder)) == latest
    with pytest.raises(UserError, match="does not exist; the latest is step-000003"):
        resolve_checkpoint(str(store.folder / "step-000002"))
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve_checkpoint(str(tmp_path / "model.gguf"))


def test_a_renamed_checkpoint_with_a_loss_of_zero_stays_the_best(store, monkeypatch) -> None:
    latest, renamed = (store.folder / name for name in ("step-000010", "step-000020.decayed-1"))
    renamed.mkdir(parents=True)
    states = {latest: (0.5, 10), renamed: (0.0, 20)}

    def read_state(path: Path) -> dict[str, object]:
        return {"progress": dict(zip(("best_loss", "best_step"), states[path], strict=True))}

    monkeypatch.setattr(store_module, "read_state", read_state)
    monkeypatch.setattr(store_module, "find_corruption", lambda path, names: None)
    assert store.renamed_best(latest) == renamed
    states[renamed] = (0.6, 20)
    assert store.renamed_best(latest) is None
