"""What is made ready beside all else."""

import contextlib
import dataclasses
import gc
import threading

import pytest
import torch

from gptforge.builders import kernel_warmup
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.device import Precision
from gptforge.presets import get_preset


def test_on_a_cpu_there_is_nothing_to_wait_for() -> None:
    before = threading.active_count()
    nothing = KernelWarmup(
        torch.device("cpu"), get_preset("debug"), Precision(torch.float32, "test")
    )
    assert threading.active_count() == before
    nothing.wait()


def test_what_fails_in_it_is_left_to_those_who_want_it(monkeypatch) -> None:
    calls, complaints = [], []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise RuntimeError("no driver")

    monkeypatch.setattr(threading, "excepthook", complaints.append)
    monkeypatch.setattr(torch, "zeros", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    failing = KernelWarmup(
        torch.device("cuda"), get_preset("debug"), Precision(torch.bfloat16, "test")
    )
    failing.wait()
    assert calls and not complaints


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("vocab_size", [0, 64])
def test_all_that_is_tried_out_can_be_computed(vocab_size, dropout, monkeypatch) -> None:
    config = dataclasses.replace(get_preset("debug"), vocab_size=vocab_size, dropout=dropout)
    tried = KernelWarmup(torch.device("cpu"), config, Precision(torch.bfloat16, "test"))
    called = []
    monkeypatch.setattr(kernel_warmup, "cross_entropy_in_place", lambda *_: called.append(1))
    tried.run_attention()
    tried.run_triton_kernels()
    assert len(called) == bool(vocab_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_it_takes_no_numbers_from_the_dice_and_keeps_no_memory() -> None:
    def do() -> None:
        KernelWarmup(
            torch.device("cuda"), get_preset("debug"), Precision(torch.bfloat16, "test")
        ).wait()

    # Libraries allocate workspaces once; what earlier tests left behind is freed first.
    do()
    gc.collect()
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(3)
    before = torch.cuda.memory_allocated()
    do()
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.rand(4, device="cuda"), expected)
