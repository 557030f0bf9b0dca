"""A run folder from elsewhere: nothing in it leads to files outside of it."""

import os
import shutil
from pathlib import Path

import pytest

import gptforge
from gptforge.builders.export_model import export_gguf, export_hf, export_space
from gptforge.checkpoint.store import (
    CheckpointStore,
    Snapshot,
    read_config,
    read_tensors,
    read_tokenizer,
    resolve_checkpoint,
)
from gptforge.cli import main
from gptforge.errors import UserError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows gives links to few")

DEBUG = "--preset debug --device cpu --n_embd 8 --n_layer 1 --warmup_steps 1 --max_steps"
EXPORTS = {
    "hf": lambda run, out: export_hf(str(run), out, log=lambda _: None),
    "space": lambda run, out: export_space(str(run), out, log=lambda _: None),
    "gguf": lambda run, out: export_gguf(str(run), out, dtype="f32", log=lambda _: None),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("To be, or not to be.\n" * 40)
    where = ["--input", str(folder / "text.txt"), "--out_dir", str(folder / "run")]
    assert main([*DEBUG.split(), "2", *where]) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "run"


def go_on(made: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Train the run for longer; the last line of what it says."""
    where = ["--input", str(made / "text.txt"), "--out_dir", str(run)]
    capfd.readouterr()
    code = main([*DEBUG.split(), "3", *where])
    said = capfd.readouterr()
    return said.err.splitlines()[-1] if code else "finished"


def to_secret(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.parents[1] / "secret")


@pytest.mark.parametrize("name", ["training_curves.png", "metrics.jsonl"])
@pytest.mark.parametrize("form", ["hf", "space"])
def test_a_link_is_not_copied_into_an_export(run, tmp_path, name, form) -> None:
    to_secret(run / name)
    with pytest.raises(UserError, match=f"{name} is a symbolic link, and not copied"):
        EXPORTS[form](run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["log.md", "metrics.jsonl", "samples.md", "training_curves.png", "config.toml"]
)
def test_a_run_with_a_link_among_its_files_is_not_trained(made, run, capfd, name) -> None:
    to_secret(run / name)
    assert f"{name} is a symbolic link" in go_on(made, run, capfd)
    assert (run.parent / "secret").read_text() == "mine"
    # The remedy helps.
    (run / name).unlink()
    assert go_on(made, run, capfd) == "finished"


@pytest.mark.parametrize("name", [".config.partial.toml", ".training_curves.partial.png"])
def test_a_link_in_the_place_of_a_temporary_file_is_replaced(made, run, capfd, name) -> None:
    to_secret(run / name)
    assert go_on(made, run, capfd) == "finished"
    assert (run.parent / "secret").read_text() == "mine"
    assert not os.path.lexists(run / name)


def test_a_lock_that_is_a_link_makes_no_file_elsewhere(made, run, capfd) -> None:
    (run / ".lock").symlink_to(run.parent / "elsewhere")
    assert ".lock is a symbolic link, not a regular file: delete it" in go_on(made, run, capfd)
    assert not (run.parent / "elsewhere").exists()


def test_checkpoints_are_saved_into_the_run_alone(made, run, tmp_path, capfd) -> None:
    (run / "checkpoints").rename(tmp_path / "big")
    (run / "checkpoints").symlink_to("../big")
    before = sorted(path.name for path in (tmp_path / "big").iterdir())
    assert "checkpoints is a link to ../big" in go_on(made, run, capfd)
    assert sorted(path.name for path in (tmp_path / "big").iterdir()) == before
    # It is the reader's own affair to read what a link leads to, but nobody publishes it unawares.
    assert gptforge.load(run, device="cpu").generate_batch("To", 2)
    with pytest.raises(UserError, match="name the checkpoint that you want") as caught:
        EXPORTS["hf"](run, tmp_path / "out")
    named = str(caught.value).split(", ")[-1]
    EXPORTS["hf"](named, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_folder_may_itself_be_a_link(made, run, tmp_path, capfd) -> None:
    run.rename(tmp_path / "big")
    run.symlink_to("big")
    assert go_on(made, run, capfd) == "finished"
    assert run.is_symlink()
    EXPORTS["space"](run, tmp_path / "out")
    assert (tmp_path / "out" / "training_curves.png").exists()


@pytest.mark.parametrize("kind", ["file", "pipe", "link", "empty", "device", "garbage"])
def test_odd_checkpoints_are_told_and_never_looked_for_again(made, tmp_path, kind) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-000001"
    step.parent.mkdir(parents=True)
    if kind in ("file", "pipe", "link"):
        expected = "has no checkpoint yet"
        {"file": step.touch, "pipe": lambda: os.mkfifo(step)}.get(
            kind, lambda: step.symlink_to(made / "run" / "checkpoints" / "step-000002")
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
    # A whole one beside it is found, and named where the newest is damaged.
    shutil.copytree(made / "run" / "checkpoints" / "step-000002", step.parent / "step-000000")
    if expected == "has no checkpoint yet":
        assert gptforge.load(tmp_path / "run", device="cpu").generate_batch("To", 2)
    else:
        with pytest.raises(UserError, match="step-000000 is intact"):
            gptforge.load(tmp_path / "run")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_checkpoint_is_saved_though_something_odd_has_its_name(made, tmp_path, kind) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.folder.mkdir(parents=True)
    odd = store.folder / "step-000002"
    odd.symlink_to("nowhere") if kind == "link" else odd.write_text("mine")
    good = CheckpointStore(made / "run" / "checkpoints")
    path = good.checkpoints()[0]
    groups = [read_tensors(path, f"{name}.safetensors") for name in ("model", "optimizer", "rng")]
    store.save(2, Snapshot(*groups, {}), tokenizer=read_tokenizer(path), config="")
    assert store.read_link("last") == odd
    assert os.path.lexists(store.folder / "step-000002.old-1")


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_file_of_tensors_is_not_larger_than_its_model_can_be(run, name) -> None:
    path = run / "checkpoints" / "step-000002"
    with (path / f"{name}.safetensors").open("rb+") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"1,099,511,627,776"):
        read_config(path)
        read_tensors(path, f"{name}.safetensors")
