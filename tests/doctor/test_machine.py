"""`doctor`: what this machine can do, each with its reason; other machines are played."""

import json
import shutil
import types

import pytest
import torch

from gptforge.doctor import machine


def lines() -> list[str]:
    return [f"{finding.level} {finding}" for finding in machine.check_machine()]


def test_this_machine_is_described(program) -> None:
    done = program("doctor")
    assert done.code == 0
    for word in (
        "Python",
        "torch",
        "device:",
        "precision:",
        "torch.compile:",
        "disk of this folder",
    ):
        assert word in done.out
    record = json.loads(program("doctor", "--json").out)
    assert record["ok"] is True


def test_what_is_not_installed_is_named_with_the_command_that_brings_it(monkeypatch) -> None:
    def find(name: str) -> object | None:
        return None if name in ("pyarrow", "gradio") else object()

    monkeypatch.setattr(machine.importlib.util, "find_spec", find)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.0")
    said = "\n".join(lines())
    assert "not here: pyarrow, for Parquet" in said
    assert "pip install -e '.[data]'" in said
    assert "pip install -e '.[demo]'" in said


def test_a_driver_without_a_torch_that_uses_it_is_pointed_out(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert any("this torch was built without CUDA" in line for line in lines())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("built for GPUs, and finds none" in line for line in lines())


def test_gpus_are_listed_with_their_peaks(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place=None: "NVIDIA H100 80GB HBM3")
    properties = types.SimpleNamespace(total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    found = [str(finding) for finding in machine._gpus()]
    assert found == [
        f"GPU {i}: NVIDIA H100 80GB HBM3, 85 GB, capability 9.0, 989 TFLOP/s at most"
        for i in (0, 1)
    ]


def test_a_missing_compiler_has_a_remedy(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "no Triton" in str(machine._compiler(gpu)[0])
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install gcc or clang" in str(machine._compiler(gpu)[0])


def test_little_room_on_the_disk_is_a_warning(monkeypatch) -> None:
    usage = types.SimpleNamespace(free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert [f.level for f in machine._disk()] == ["warning", "warning"]


@pytest.mark.parametrize(
    "args", [("--context_length", -1), ("--val_fraction", 1), ("--nonsense", 1)]
)
def test_mistakes_are_said_in_a_line(program, args) -> None:
    done = program("doctor", *args)
    assert done.code == 2
    assert done.err.startswith("error: ") and len(done.err.splitlines()) == 1
