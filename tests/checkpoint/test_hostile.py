"""A hostile checkpoint works or is refused with a UserError, whatever its bytes."""

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gptforge
from gptforge import files
from gptforge.checkpoint import format as checkpoints
from gptforge.checkpoint.format import (
    CHECKPOINT_FILES,
    find_corruption,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
)
from gptforge.checkpoint.store import CheckpointStore
from gptforge.cli import main
from gptforge.config_file import read_toml
from gptforge.errors import RunError, UserError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.txt").write_text("To be, or not to be.\n" * 40)
    flags = "--preset debug --device cpu --max_steps 2 --n_embd 8 --n_layer 1 --warmup_steps 1"
    where = ["--input", str(folder / "text.txt"), "--out_dir", str(folder / "run")]
    assert main([*flags.split(), *where]) == 0
    return folder / "run" / "checkpoints" / "step-000002"


def forge(good: Path, target: Path, name: str, content: bytes) -> Path:
    """Copy a checkpoint with one file replaced and a matching manifest."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    (target / name).write_bytes(content)
    manifest = json.loads((target / "manifest.json").read_text())
    listed = {"bytes": len(content), "sha256": files.sha256(target / name)}
    manifest["files"][name] = listed
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def load_error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        gptforge.load(path, device="cpu").generate("To", 3, seed=1)
    return str(caught.value)


def read_all_files(path: Path) -> None:
    """Call all readers of a checkpoint, which may raise nothing but a UserError."""
    for read in (
        read_config,
        read_state,
        read_tokenizer,
        *(
            lambda p, n=name: read_tensors(p, n)
            for name in CHECKPOINT_FILES
            if name.endswith("tensors")
        ),
        lambda p: gptforge.load(p, device="cpu").generate("To", 2, seed=1),
    ):
        try:
            read(path)
        except UserError:
            continue


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from([*CHECKPOINT_FILES, "manifest.json"]))
def test_readers_survive_any_bytes_in_any_file(good, tmp_path, data, name) -> None:
    raw = (good / name).read_bytes()
    start = data.draw(st.integers(0, min(len(raw), 3000)))
    end = start + data.draw(st.integers(0, 40))
    content = raw[:start] + data.draw(st.binary(max_size=40)) + raw[end:]
    if name == "manifest.json":
        path = tmp_path / "forged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(good, path)
        (path / name).write_bytes(content)
    else:
        path = forge(good, tmp_path / "forged", name, content)
    read_all_files(path)


@settings(max_examples=150)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8")))
def test_config_reader_survives_any_bytes(tmp_path_factory, raw) -> None:
    path = tmp_path_factory.mktemp("config") / "c.toml"
    path.write_bytes(raw)
    try:
        read_toml(path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "field", ["n_layer = 1000000000", "n_embd = 1099511627776", "vocab_size = 9000000000"]
)
def test_model_larger_than_the_weights_is_refused_before_it_is_built(good, tmp_path, field) -> None:
    text = (good / "config.toml").read_text()
    name = field.split()[0]
    lines = [field if line.startswith(f"{name} =") else line for line in text.splitlines()]
    path = forge(good, tmp_path / "forged", "config.toml", "\n".join(lines).encode())
    assert "describes a model of" in load_error(path)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 93)
        + b'{"transformer.wte.weight":{"dtype":"F32","shape":[99999999999],'
        + b'"data_offsets":[0,399999999996]}}'[:93],
    ],
)
def test_header_with_wrong_offsets_is_refused(good, tmp_path, header) -> None:
    rest = (good / "model.safetensors").read_bytes()[8:]
    path = forge(good, tmp_path / "forged", "model.safetensors", header + rest)
    assert "safetensors" in load_error(path)


def test_deeply_nested_or_huge_json_is_refused(good, tmp_path, monkeypatch) -> None:
    for name in ("tokenizer.json", "state.json"):
        path = forge(good, tmp_path / "forged", name, b"[" * 200_000)
        read_all_files(path)
    assert "tokenizer" in load_error(forge(good, tmp_path / "f", "tokenizer.json", b"[" * 200_000))
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1000)
    big = forge(good, tmp_path / "forged", "tokenizer.json", b" " * 1001)
    assert "more than any file" in load_error(big)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_unreadable_checkpoint_is_left_as_it_is(good, tmp_path, monkeypatch) -> None:
    shutil.copytree(good.parent, tmp_path / "checkpoints", symlinks=True)

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", refuse)
        with pytest.raises(RunError, match=r"model\.safetensors: permission denied: .* left as it"):
            CheckpointStore(tmp_path / "checkpoints").latest()
    newest, warnings = CheckpointStore(tmp_path / "checkpoints").latest()
    assert newest is not None and newest.name == good.name and not warnings


def test_load_survives_a_training_that_deletes_checkpoints(good, tmp_path, monkeypatch) -> None:
    """The best checkpoint may be gone when it is about to be read; then there is a newer one."""
    shutil.copytree(good, tmp_path / "run" / "checkpoints" / "step-000003")
    found = [tmp_path / "run" / "checkpoints" / "step-000002"]
    resolve = checkpoints.resolve_checkpoint
    monkeypatch.setattr(
        checkpoints, "resolve_checkpoint", lambda run: found.pop() if found else resolve(run)
    )
    assert gptforge.load(tmp_path / "run").generate_batch("To", 3)
    assert not found
    # A damaged one is not retried.
    (tmp_path / "run" / "checkpoints" / "step-000003" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"damaged: tokenizer\.json is missing"):
        gptforge.load(tmp_path / "run")


def test_links_out_of_the_checkpoint_are_refused(good, tmp_path) -> None:
    path = tmp_path / "linked"
    shutil.copytree(good, path)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a symbolic link" in load_error(path)


def test_unknown_names_in_a_manifest_are_never_opened(good, tmp_path) -> None:
    path = tmp_path / "forged"
    shutil.copytree(good, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../outside.txt"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert find_corruption(path) is None


def test_hostile_links_do_not_lead_out_of_the_run(good, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(good.parents[1], run, symlinks=True)
    files.remove(run / "checkpoints" / "best")
    (run / "checkpoints" / "best").write_text("../../../etc\n")
    # It is not the name of a checkpoint, so `last` is loaded.
    assert gptforge.load(run, device="cpu").encode("To")
