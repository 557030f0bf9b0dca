"""A checkpoint from a stranger: whatever its bytes say, it is refused in words or it works."""

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
from gptforge.checkpoint import store
from gptforge.checkpoint.store import (
    CHECKPOINT_FILES,
    CheckpointStore,
    find_corruption,
    read_config,
    read_state,
    read_tensors,
    read_tokenizer,
)
from gptforge.cli import main
from gptforge.config import read_toml
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
    """A copy with one file replaced and a manifest that agrees with it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    (target / name).write_bytes(content)
    manifest = json.loads((target / "manifest.json").read_text())
    listed = {"bytes": len(content), "sha256": files.sha256(target / name)}
    manifest["files"][name] = listed
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        gptforge.load(path, device="cpu").generate("To", 3, seed=1)
    return str(caught.value)


def read_everything(path: Path) -> None:
    """All readers of a checkpoint; a UserError is fine, anything else is not."""
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


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), name=st.sampled_from([*CHECKPOINT_FILES, "manifest.json"]))
def test_no_bytes_in_any_file_get_past_the_readers(good, tmp_path, data, name) -> None:
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
    read_everything(path)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8")))
def test_no_bytes_get_past_the_reader_of_configurations(tmp_path_factory, raw) -> None:
    path = tmp_path_factory.mktemp("config") / "c.toml"
    path.write_bytes(raw)
    try:
        read_toml(path)
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "field", ["n_layer = 1000000000", "n_embd = 1099511627776", "vocab_size = 9000000000"]
)
def test_a_model_larger_than_its_file_is_refused_before_it_is_built(good, tmp_path, field) -> None:
    text = (good / "config.toml").read_text()
    name = field.split()[0]
    lines = [field if line.startswith(f"{name} =") else line for line in text.splitlines()]
    path = forge(good, tmp_path / "forged", "config.toml", "\n".join(lines).encode())
    assert "describes a model of" in refused(path)


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
def test_a_header_that_promises_what_is_not_there_is_refused(good, tmp_path, header) -> None:
    rest = (good / "model.safetensors").read_bytes()[8:]
    path = forge(good, tmp_path / "forged", "model.safetensors", header + rest)
    assert "safetensors" in refused(path)


def test_text_that_nests_for_ever_or_fills_the_memory_is_refused(
    good, tmp_path, monkeypatch
) -> None:
    for name in ("tokenizer.json", "state.json"):
        path = forge(good, tmp_path / "forged", name, b"[" * 200_000)
        read_everything(path)
    assert "tokenizer" in refused(forge(good, tmp_path / "f", "tokenizer.json", b"[" * 200_000))
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1000)
    big = forge(good, tmp_path / "forged", "tokenizer.json", b" " * 1001)
    assert "more than any file" in refused(big)


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_checkpoint_that_the_system_does_not_let_be_read_is_left_where_it_is(
    good, tmp_path, monkeypatch
) -> None:
    shutil.copytree(good.parent, tmp_path / "checkpoints", symlinks=True)

    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", refuse)
        with pytest.raises(RunError, match=r"model\.safetensors: Permission denied: .* left as it"):
            CheckpointStore(tmp_path / "checkpoints").latest()
    newest, warnings = CheckpointStore(tmp_path / "checkpoints").latest()
    assert newest is not None and newest.name == good.name and not warnings


def test_a_model_is_found_though_a_training_beside_deletes_checkpoints(
    good, tmp_path, monkeypatch
) -> None:
    """The best one of a run may be gone when it is about to be read: there is a newer one then."""
    shutil.copytree(good, tmp_path / "run" / "checkpoints" / "step-000003")
    found = [tmp_path / "run" / "checkpoints" / "step-000002"]
    resolve = store.resolve_checkpoint
    monkeypatch.setattr(
        store, "resolve_checkpoint", lambda run: found.pop() if found else resolve(run)
    )
    assert gptforge.load(tmp_path / "run").generate_batch("To", 3)
    assert not found
    # One that is there and damaged is not looked for again.
    (tmp_path / "run" / "checkpoints" / "step-000003" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"damaged: tokenizer\.json is missing"):
        gptforge.load(tmp_path / "run")


def test_links_out_of_the_folder_are_refused(good, tmp_path) -> None:
    path = tmp_path / "linked"
    shutil.copytree(good, path)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "model.safetensors is a symbolic link" in refused(path)


def test_names_in_a_manifest_lead_nowhere(good, tmp_path) -> None:
    path = tmp_path / "forged"
    shutil.copytree(good, path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../outside.txt"] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    # Only the names that we know are ever opened.
    assert find_corruption(path) is None


def test_pointers_of_a_strangers_run_stay_inside_it(good, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(good.parents[1], run, symlinks=True)
    files.remove(run / "checkpoints" / "best")
    (run / "checkpoints" / "best").write_text("../../../etc\n")
    # It is not a checkpoint's name, so `last` is taken.
    assert gptforge.load(run, device="cpu").encode("To")
