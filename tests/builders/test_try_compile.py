"""When training uses torch.compile, and what happens where that does not work."""

from types import SimpleNamespace

import pytest
import torch

from gptforge.builders import build_train_step
from gptforge.builders.build_train_step import try_compile
from gptforge.config import Config
from gptforge.kernel_select import DEFAULT_KERNELS


class FakeStep(SimpleNamespace):
    """A training step that records what is called, and fails to compile with `error`."""

    kernels = DEFAULT_KERNELS
    micro_batch_size = 1

    def __init__(self, device: str, error: Exception | None = None) -> None:
        super().__init__(device=torch.device(device), error=error, calls=[])

    def compile(self) -> None:
        self.calls.append("compile")

    def set_kernels(self, kernels) -> None:
        self.calls.append("set_kernels")


@pytest.fixture(autouse=True)
def fake_dry_run(monkeypatch) -> None:
    def dry_run(step: FakeStep, batch_size: int, context_length: int) -> None:
        step.calls.append("dry_run")
        if step.error:
            raise step.error

    monkeypatch.setattr(build_train_step, "dry_run", dry_run)


def test_failed_compilation_is_reported_in_one_line() -> None:
    error = RuntimeError("Cannot find a working triton installation.\nlong trace\nmore")
    step = FakeStep("cpu", error)
    compiled, reason = try_compile(step, Config(compile="true"))
    assert not compiled
    assert "working triton" in reason
    assert "\n" not in reason
    assert step.calls == ["compile", "dry_run", "set_kernels"]


def test_compile_is_off_where_it_does_not_pay() -> None:
    on_cpu, off, on_gpu = FakeStep("cpu"), FakeStep("cuda"), FakeStep("cuda")
    assert try_compile(on_cpu, Config(compile="auto"))[0] is False
    assert try_compile(off, Config(compile="false")) == (False, "as requested")
    assert try_compile(on_gpu, Config(compile="auto"))[0] is True
    assert on_cpu.calls == off.calls == []
    assert on_gpu.calls == ["compile", "dry_run"]


def test_out_of_memory_is_not_a_failed_compilation() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        try_compile(FakeStep("cuda", torch.OutOfMemoryError()), Config(compile="true"))
