"""Kernels are warmed up in threads, without side effects."""

import contextlib
import dataclasses
import gc
import threading
import time

import pytest
import torch

from gptforge.builders import kernel_warmup
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.device import Precision
from gptforge.presets import get_preset


def test_cpu_has_no_warmup() -> None:
    before = set(threading.enumerate())
    warmup = KernelWarmup(
        torch.device("cpu"), get_preset("debug"), Precision(torch.float32, "test")
    )
    assert set(threading.enumerate()) <= before
    warmup.wait()


def test_failures_are_ignored(monkeypatch) -> None:
    calls, uncaught = [], []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise RuntimeError("no driver")

    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    warmup = KernelWarmup(
        torch.device("cuda"), get_preset("debug"), Precision(torch.bfloat16, "test")
    )
    warmup.wait()
    assert calls and not uncaught


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("vocab_size", [0, 64])
@pytest.mark.parametrize("float8", [False, True])
def test_all_warmed_up_kernels_run(vocab_size, dropout, float8, monkeypatch) -> None:
    config = dataclasses.replace(get_preset("debug"), vocab_size=vocab_size, dropout=dropout)
    precision = Precision(torch.bfloat16, "test", float8=float8)
    warmup = KernelWarmup(torch.device("cpu"), config, precision)
    calls = []
    monkeypatch.setattr(kernel_warmup, "cross_entropy_in_place", lambda *_, **__: calls.append(1))
    warmup.run_attention()
    warmup.run_triton_kernels()
    # A run in fp8 begins in bfloat16, so it has the kernels of both.
    assert len(calls) == bool(vocab_size) * (1 + float8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_rng_and_memory_are_unchanged() -> None:
    def warm_up() -> None:
        KernelWarmup(
            torch.device("cuda"), get_preset("debug"), Precision(torch.bfloat16, "test")
        ).wait()

    # Libraries allocate workspaces once; garbage of earlier tests is freed first.
    warm_up()
    gc.collect()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    before = torch.cuda.memory_allocated()
    warm_up()
    # Autograd's own thread frees its tensors a moment after it has returned the gradients.
    deadline = time.monotonic() + 10
    while torch.cuda.memory_allocated() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.rand(4, device="cuda"), expected)
