"""Links in a run folder from elsewhere never lead to files outside of it."""

import os
import shutil
from pathlib import Path

import pytest

import gptforge
from gptforge.builders.export_model import export_gguf, export_hf, export_space
from gptforge.checkpoint.format import (
    Snapshot,
    read_config,
    read_tensors,
    read_tokenizer,
    resolve_checkpoint,
)
from gptforge.checkpoint.store import CheckpointStore
from gptforge.cli import main
from gptforge.errors import UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows restricts symbolic links")

DEBUG = "--preset debug --device cpu --n_embd 8 --n_layer 1 --warmup_steps 1 --max_steps"
EXPORTS = {
    "hf": lambda run, out: export_hf(str(run), out),
    "space": lambda run, out: export_space(str(run), out),
    "gguf": lambda run, out: export_gguf(str(run), out, dtype="f32"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("To be, or not to be.\n" * 40)
    where = ["--input", str(folder / "text.txt"), "--out_dir", str(folder / "run")]
    assert main([*DEBUG.split(), "2", *where]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "run"


def resume(finished: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Train the run for longer; returns "finished" or the error."""
    where = ["--input", str(finished / "text.txt"), "--out_dir", str(run)]
    capfd.readouterr()
    code = main([*DEBUG.split(), "3", *where])
    output = capfd.readouterr()
    return output.err.splitlines()[-1] if code else "finished"


def replace_by_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parents[1] / "secret")


@pytest.mark.parametrize("name", ["training_curves.png", "metrics.jsonl"])
@pytest.mark.parametrize("form", ["hf", "space"])
def test_export_does_not_follow_links(run, tmp_path, name, form) -> None:
    replace_by_link(run / name)
    with pytest.raises(UserError, match=f"{name} is a symbolic link, and not copied"):
        EXPORTS[form](run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["log.md", "metrics.jsonl", "samples.md", "training_curves.png", "config.toml"]
)
def test_run_with_a_link_among_its_files_is_not_trained(finished, run, capfd, name) -> None:
    replace_by_link(run / name)
    assert f"{name} is a symbolic link" in resume(finished, run, capfd)
    assert (run.parent / "secret").read_text() == "mine"
    # The hint helps.
    (run / name).unlink()
    assert resume(finished, run, capfd) == "finished"


@pytest.mark.parametrize("name", [".config.partial.toml", ".training_curves.partial.png"])
def test_link_with_the_name_of_a_temporary_file_is_replaced(finished, run, capfd, name) -> None:
    replace_by_link(run / name)
    assert resume(finished, run, capfd) == "finished"
    assert (run.parent / "secret").read_text() == "mine"
    assert not os.path.lexists(run / name)


def test_lock_file_that_is_a_link_is_refused(finished, run, capfd) -> None:
    (run / ".lock").symlink_to(run.parent / "elsewhere")
    assert ".lock is a symbolic link, not a regular file: delete it" in resume(finished, run, capfd)
    assert not (run.parent / "elsewhere").exists()


def test_checkpoints_are_saved_only_into_the_run(finished, run, tmp_path, capfd) -> None:
    (run / "checkpoints").rename(tmp_path / "big")
    (run / "checkpoints").symlink_to("../big")
    before = sorted(path.name for path in (tmp_path / "big").iterdir())
    assert "checkpoints is a link to ../big" in resume(finished, run, capfd)
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == before
    # A link may be read, but is never published unawares.
    assert gptforge.load(run, device="cpu").generate_batch("To", 2)
    with pytest.raises(UserError, match="name the checkpoint that you want") as caught:
        EXPORTS["hf"](run, tmp_path / "out")
    named = str(caught.value).split(", ")[-1]
    EXPORTS["hf"](named, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_run_folder_may_be_a_link(finished, run, tmp_path, capfd) -> None:
    run.rename(tmp_path / "big")
    run.symlink_to("big")
    assert resume(finished, run, capfd) == "finished"
    assert run.is_symlink()
    EXPORTS["space"](run, tmp_path / "out")
    assert (tmp_path / "out" / "training_curves.png").exists()


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "empty", "device", "garbage"])
def test_odd_checkpoints_are_reported(finished, tmp_path, kind) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    step.parent.mkdir(parents=True)
    if kind in ("file", "pipe", "link"):
        expected = "has no checkpoint yet"
        {"file": step.touch, "pipe": lambda: os.mkfifo(step)}.get(
            kind, lambda: step.symlink_to(finished / "run" / "checkpoints" / "step-000002")
        )()
    else:
        expected = r"damaged: manifest\.json"
        step.mkdir()
        if kind == "device":
            (step / "manifest.json").symlink_to("/dev/zero")
        elif kind == "garbage":
            (step / "manifest.json").write_text("[" * 10**5)
    for use in (
        lambda: gptforge.load(tmp_path / "run"),
        lambda: EXPORTS["hf"](tmp_path / "run", 0),
    ):
        with pytest.raises(UserError, match=expected):
            use()
    if kind == "empty":
        with pytest.raises(UserError, match=r"damaged: manifest\.json is missing"):
            resolve_checkpoint(str(step))
    # An intact one beside it is found, and named if the latest is damaged.
    shutil.copytree(finished / "run" / "checkpoints" / "step-000002", step.parent / "step-000000")
    if expected == "has no checkpoint yet":
        assert gptforge.load(tmp_path / "run", device="cpu").generate_batch("To", 2)
    else:
        with pytest.raises(UserError, match="step-000000 is intact"):
            gptforge.load(tmp_path / "run")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_save_replaces_something_odd_of_the_same_name(finished, tmp_path, kind) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.folder.mkdir(parents=True)
    odd = store.folder / "step-000002"
    odd.symlink_to("nowhere") if kind == "link" else odd.write_text("mine")
    good = CheckpointStore(finished / "run" / "checkpoints")
    path = good.checkpoints()[0]
    groups = [read_tensors(path, f"{name}.safetensors") for name in ("model", "optimizer", "rng")]
    store.save(2, Snapshot(*groups, {}), tokenizer=read_tokenizer(path), config="")
    assert store.read_link("last") == odd
    assert os.path.lexists(store.folder / "step-000002.old-1")


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_oversized_safetensors_file_is_refused(run, name) -> None:
    path = run / "checkpoints" / "step-000002"
    with (path / f"{name}.safetensors").open("rb+") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"1,099,511,627,776"):
        read_config(path)
        read_tensors(path, f"{name}.safetensors")
