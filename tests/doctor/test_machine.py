"""`gptforge doctor`: this machine, and others by monkeypatching."""

import json
import shutil
import types

import pytest
import torch

from gptforge.doctor import machine


def test_this_machine(program) -> None:
    done = program("doctor")
    assert done.code == 0
    for words in ("Python", "torch", "device:", "precision:", "torch.compile:", "this folder"):
        assert words in done.out
    assert json.loads(program("doctor", "--json").out)["ok"] is True


def test_missing_packages_come_with_the_install_command(monkeypatch) -> None:
    def find_spec(name: str) -> object | None:
        return None if name in ("pyarrow", "starlette") else object()

    monkeypatch.setattr(machine.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.0")
    out = "\n".join(str(finding) for finding in machine.check_machine())
    assert "the fastest encoder: pyarrow not installed" in out
    assert "pip install -e '.[data]'" in out
    assert "pip install -e '.[demo]'" in out


def test_nvidia_driver_without_a_cuda_build_of_torch(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "torch was built without CUDA" in str(machine._check_gpus()[0])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for GPUs, and finds none" in str(machine._check_gpus()[0])


def test_gpus_with_their_peak_flops(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=None: (9, 0))
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=None: name)
    properties = types.SimpleNamespace(name=name, major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: properties)
    assert [str(finding) for finding in machine._check_gpus()] == [
        f"GPU {i}: NVIDIA H100 80GB HBM3, 85 GB, capability 9.0, at most 989 TFLOP/s"
        for i in (0, 1)
    ]


def test_missing_compiler(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "Triton is missing" in str(machine._check_compiler(gpu))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "install gcc or clang" in str(machine._check_compiler(gpu))


def test_low_disk_space(monkeypatch) -> None:
    usage = shutil._ntuple_diskusage(10**12, 0, 2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert [finding.level for finding in machine._check_disk()] == ["warning", "warning"]


@pytest.mark.parametrize(
    "args", [("--context_length", -1), ("--val_fraction", 1), ("--nonsense", 1)]
)
def test_usage_errors_are_one_line(program, args) -> None:
    done = program("doctor", *args)
    assert done.code == 2
    assert done.err.startswith("error: ") and len(done.err.splitlines()) == 1
