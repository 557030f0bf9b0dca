"""Devices are faked: what is asked of torch is what the choice depends on."""

import platform
import types
from pathlib import Path

import pytest
import torch

from gptforge.device import (
    Precision,
    _cpu_vendor,
    memory_bandwidth,
    select_device,
    select_precision,
    usable_memory,
)
from gptforge.errors import UserError
from gptforge.kernel_select import (
    DEFAULT_KERNELS,
    KernelConfig,
    sdpa_backend,
    select_kernels,
    try_compile,
)
from gptforge.train.backends.manual_layers import prefer_separate_dgelu

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
def test_bfloat16_only_on_gpus_that_compute_in_it(monkeypatch, capability, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    # An emulating card says yes here; nobody may ask it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_a, **_k: True)
    monkeypatch.setattr(torch.version, "hip", None)
    precision = select_precision("auto", CUDA)
    assert precision.dtype == dtype
    assert precision.needs_scaler == (dtype == torch.float16)
    assert f"{capability[0]}.{capability[1]}" in precision.reason


@pytest.mark.parametrize(
    ("vendor", "able", "dtype"),
    [
        ("AuthenticAMD", {"avx512_bf16": True}, torch.bfloat16),
        ("GenuineIntel", {"avx512_bf16": True}, torch.float32),
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("AuthenticAMD", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("", {"bf16": True, "sve": True}, torch.float32),
        ("", {}, torch.float32),
    ],
)
def test_bfloat16_only_on_cpus_that_are_faster_with_it(monkeypatch, vendor, able, dtype) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr("gptforge.device._cpu_vendor", lambda: vendor)
    assert select_precision("auto", CPU).dtype == dtype


def test_a_cpus_vendor_is_asked_of_the_system(monkeypatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor: 0\nvendor_id: GenuineIntel")
    assert "Intel" in _cpu_vendor()
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6")
    assert "Intel" in _cpu_vendor()


def test_a_precision_given_by_hand_is_taken() -> None:
    assert select_precision("float16", CUDA).dtype == torch.float16
    assert select_precision("auto", MPS).dtype == torch.float32


def test_the_best_device_is_found(monkeypatch) -> None:
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
    assert current == [], "0 is the current one from the beginning"
    assert select_device("cuda:1")[0].index == 1
    assert current == [1], "where kernels start"
    with pytest.raises(UserError, match="0 to 1"):
        select_device("cuda:2")


@pytest.mark.parametrize("flag", ["cuda", "cuda:0", "mps", "tpu", "cuda:x", "cpu:1", ""])
def test_a_device_that_is_not_there_is_refused(monkeypatch, flag) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device"):
        select_device(flag)


def test_the_attention_kernel_is_named(monkeypatch) -> None:
    shape = {"n_head": 2, "head_size": 8, "context_length": 16}
    assert sdpa_backend(CPU, torch.float32, **shape) in ("flash", "math")
    monkeypatch.setattr(torch, "_fused_sdp_choice", None)
    assert sdpa_backend(CPU, torch.float32, **shape) == "unknown"


def test_a_compiler_that_fails_is_dropped_with_one_line() -> None:
    def fails() -> None:
        raise RuntimeError("Cannot find a working triton installation.\nlong trace\nmore")

    compiled, reason = try_compile("true", CPU, fails)
    assert not compiled
    assert "working triton" in reason
    assert "\n" not in reason


def test_compiling_is_left_alone_where_it_does_not_pay() -> None:
    def must_not_run() -> None:
        raise AssertionError

    assert try_compile("auto", CPU, must_not_run)[0] is False
    assert try_compile("false", CUDA, must_not_run) == (False, "as asked")
    assert try_compile("auto", CUDA, lambda: None)[0] is True


def test_running_out_of_memory_is_not_the_compilers_fault() -> None:
    def too_big() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        try_compile("true", CUDA, too_big)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_bfloat16_goes_the_plain_way(dtype) -> None:
    assert select_kernels(CUDA, Precision(dtype, "")) == DEFAULT_KERNELS
    # On a CPU the head's loss is fused in float32 too.
    expected = KernelConfig(fused_cross_entropy=True) if dtype == torch.float32 else DEFAULT_KERNELS
    assert select_kernels(CPU, Precision(dtype, "")) == expected


def test_an_update_is_written_out_where_that_is_fast_and_covers_the_model(monkeypatch) -> None:
    bf16 = Precision(torch.bfloat16, "")
    monkeypatch.setattr(torch.version, "hip", None)
    assert select_kernels(CUDA, bf16).manual_backward
    assert select_kernels(CUDA, bf16, dropout=0.1).manual_backward
    assert not select_kernels(
        CUDA, bf16, dropout=0.1, activation_checkpointing=True
    ).manual_backward
    assert not select_kernels(CUDA, bf16, compile_flag="true").manual_backward
    assert not select_kernels(CPU, bf16).manual_backward
    assert select_kernels(torch.device("mps"), bf16) == DEFAULT_KERNELS
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert select_kernels(CUDA, bf16) == DEFAULT_KERNELS


def test_usable_memory_is_what_is_free_and_what_we_hold_up_to_our_share(monkeypatch) -> None:
    class Properties:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    assert usable_memory(CUDA) == 550
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.4)
    assert usable_memory(CUDA) == 400


def test_bandwidth_follows_from_clock_and_width(monkeypatch) -> None:
    # An H200's: 4.9 TB/s by its data sheet.
    its = types.SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: its)
    assert memory_bandwidth(CUDA) == pytest.approx(4.9e12, rel=0.01)
    assert prefer_separate_dgelu(CUDA, 768)
    # An H100's, 3.35 TB/s.
    its.memory_clock_rate, its.memory_bus_width = 2_619_000, 5120
    assert memory_bandwidth(CUDA) == pytest.approx(3.35e12, rel=0.01)
    assert not prefer_separate_dgelu(CUDA, 768) and prefer_separate_dgelu(CUDA, 384)
    # torch did not always say.
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    assert memory_bandwidth(CUDA) == memory_bandwidth(CPU) == 0
