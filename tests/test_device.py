"""Selection of device and precision, with fake devices."""

import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from gptforge.device import (
    _cpu_vendor,
    memory_bandwidth,
    select_device,
    select_eval_precision,
    select_precision,
    usable_memory,
)
from gptforge.errors import UserError
from gptforge.training.backends.manual_layers import prefer_separate_dgelu

ROOT = Path(__file__).parent.parent
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_bfloat16_only_on_gpus_with_native_support(monkeypatch, capability, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    # True even where bfloat16 is emulated: must not be used.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_a, **_k: True)
    monkeypatch.setattr(torch.version, "hip", None)
    precision = select_precision("auto", CUDA)
    assert precision.dtype == dtype
    assert precision.needs_scaler == (dtype == torch.float16)
    assert f"{capability[0]}.{capability[1]}" in precision.reason


@pytest.mark.parametrize(
    ("capability", "has_fp8"), [((8, 0), False), ((8, 9), True), ((9, 0), True)]
)
def test_fp8_only_on_gpus_that_have_it(monkeypatch, capability, has_fp8) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert select_precision("auto", CUDA).name == "bfloat16"
    for device in (CPU, MPS, CUDA):
        if device == CUDA and has_fp8:
            precision = select_precision("fp8", device)
            assert (precision.name, precision.dtype) == ("fp8", torch.bfloat16)
            assert precision.float8 and not precision.needs_scaler
        else:
            with pytest.raises(UserError, match=r"--dtype fp8 needs a GPU.*--dtype auto"):
                select_precision("fp8", device)


def test_evaluation_of_an_fp8_run_is_in_bfloat16_on_any_device() -> None:
    precision = select_eval_precision("fp8", CPU)
    assert precision.dtype == torch.bfloat16 and not precision.float8
    assert select_eval_precision("float32", CPU).dtype == torch.float32


@pytest.mark.parametrize(
    ("vendor", "capabilities", "dtype"),
    [
        ("AuthenticAMD", {"avx512_bf16": True}, torch.bfloat16),
        ("GenuineIntel", {"avx512_bf16": True}, torch.float32),
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("AuthenticAMD", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("", {"bf16": True, "sve": True}, torch.float32),
        ("", {}, torch.float32),
    ],
)
def test_bfloat16_only_on_cpus_that_are_faster_with_it(
    monkeypatch, vendor, capabilities, dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr("gptforge.device._cpu_vendor", lambda: vendor)
    assert select_precision("auto", CPU).dtype == dtype


def test_cpu_vendor(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor: 0\nvendor_id: GenuineIntel")
    assert "Intel" in _cpu_vendor()
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    assert "Intel" in _cpu_vendor()


def test_explicit_precision() -> None:
    assert select_precision("float16", CUDA).dtype == torch.float16
    assert select_precision("auto", MPS).dtype == torch.float32


def test_auto_selects_the_best_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto")[0] == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("auto")[0].type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Fake GPU")
    current = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_device("auto") == (CUDA, "Fake GPU")
    assert current == [], "GPU 0 is current by default"
    assert select_device("cuda:1")[0].index == 1
    assert current == [1], "kernels launch on the current device"
    with pytest.raises(UserError, match="0 to 1"):
        select_device("cuda:2")


@pytest.mark.parametrize("flag", ["cuda", "cuda:0", "mps", "tpu", "cuda:x", "cpu:1", ""])
def test_missing_devices_are_refused(monkeypatch, flag) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device"):
        select_device(flag)


def test_usable_memory_is_free_and_reserved_up_to_the_limit(monkeypatch) -> None:
    class Properties:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert usable_memory(CUDA) == 550
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.4)
    assert usable_memory(CUDA) == 400


def test_memory_bandwidth(monkeypatch) -> None:
    # An H200's: 4.9 TB/s by its data sheet.
    properties = types.SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert memory_bandwidth(CUDA) == pytest.approx(4.9e12, rel=0.01)
    assert prefer_separate_dgelu(CUDA, 768)
    # An H100's, 3.35 TB/s.
    properties.memory_clock_rate, properties.memory_bus_width = 2_619_000, 5120
    assert memory_bandwidth(CUDA) == pytest.approx(3.35e12, rel=0.01)
    assert not prefer_separate_dgelu(CUDA, 768) and prefer_separate_dgelu(CUDA, 384)
    # Older versions of torch lack these properties.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert memory_bandwidth(CUDA) == memory_bandwidth(CPU) == 0


ALLOCATE = """
import ctypes, resource
from gptforge.device import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 6144 * 4096
if hasattr(libc, "prctl"):
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 4 KB, wherever it runs

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(SIZE) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([page_faults() for _ in range(8)][-1])
keep_freed_memory()
print([page_faults() for _ in range(8)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only GNU's C library has mallopt")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    command = [sys.executable, "-c", ALLOCATE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 6144
    assert after < 100
