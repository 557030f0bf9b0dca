"""The CUDA context is created before torch is imported; with a fake driver."""

import atexit
import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
import threading

import pytest
import torch

from gptforge import cli, cuda_prewarm


class FakeDriver:
    """Records calls; the second one may return an error."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[object] = []
        self._error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.calls.append(("init", flags))
        return 0

    def cuDeviceGet(self, device, index: int) -> int:  # noqa: N802
        self.calls.append(("device", index))
        return self._error

    def cuDevicePrimaryCtxRetain(self, context, device) -> int:  # noqa: N802
        self.calls.append("context")
        return 0


@pytest.fixture
def driver(monkeypatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: True)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return driver


def prewarm(device: str) -> None:
    if thread := cuda_prewarm.prewarm_cuda(device):
        thread.join()


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_context_is_created_on_the_requested_device(driver, device, index) -> None:
    prewarm(device)
    assert driver.calls == [("init", 0), ("device", index), "context"]


def test_each_torchrun_process_prewarms_its_gpu(driver, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    prewarm("auto")
    assert ("device", 2) in driver.calls


def test_a_single_torchrun_process_prewarms_the_requested_gpu(driver, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    prewarm("cuda:1")
    assert ("device", 1) in driver.calls


@pytest.mark.parametrize(
    "device", ["cpu", "mps", "cuda:x", "cuda:-1", "cuda:²", "auto:3", "gpu", ""]
)
def test_other_and_invalid_devices_are_ignored(driver, device) -> None:
    prewarm(device)
    assert driver.calls == []


def test_torch_without_cuda_is_ignored(driver, monkeypatch) -> None:
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: False)
    prewarm("auto")
    assert driver.calls == []


def test_failing_or_missing_drivers_are_ignored(driver, monkeypatch) -> None:
    driver._error = 101
    prewarm("cuda:7")
    assert "context" not in driver.calls

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda_prewarm._retain_primary_context(0)


def test_exit_waits_briefly_for_a_slow_driver(monkeypatch) -> None:
    registered = []
    monkeypatch.setattr(atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(cuda_prewarm, "MAX_EXIT_WAIT", 0.01)
    finished = threading.Event()
    monkeypatch.setattr(cuda_prewarm, "_retain_primary_context", lambda index: finished.wait(60))
    thread = cuda_prewarm.prewarm_cuda("cuda")
    [(wait, *arguments)] = registered
    wait(*arguments)
    assert thread.is_alive() and thread.daemon
    finished.set()
    thread.join()


@pytest.mark.parametrize(
    ("command", "device"),
    [
        (["--input", "none.txt", "--device", "cuda:5"], "cuda:5"),
        (["eval", "none", "--device", "cuda"], "cuda"),
        (["sample", "none"], "auto"),
        (["bench", "--preset", "none", "--device", "cuda"], None),
        (["bench", "--preset", "debug", "--n_head", "5", "--device", "cuda"], "cuda"),
        (["--help"], None),
        (["--max_stepz", "3"], None),
    ],
)
def test_commands_prewarm_once_flags_are_parsed(command, device, monkeypatch, capsys) -> None:
    devices: list[str] = []
    modules = [f"gptforge.cli.{name}" for name in ("train", "bench", "eval", "sample")]
    for module in map(importlib.import_module, modules):
        monkeypatch.setattr(module, "prewarm_cuda", devices.append)
    with contextlib.suppress(SystemExit):
        cli.main(command)
    assert devices == ([] if device is None else [device])


def test_torch_is_not_imported() -> None:
    assert cuda_prewarm._torch_has_cuda() == (
        torch.version.cuda is not None and sys.platform == "linux"
    )
    code = (
        "import gptforge.cuda_prewarm as module, sys; module._torch_has_cuda()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_torch_uses_the_prewarmed_context() -> None:
    code = (
        "import ctypes\n"
        "from gptforge.cuda_prewarm import prewarm_cuda\n"
        "prewarm_cuda('cuda').join()\n"
        "driver = ctypes.CDLL('libcuda.so.1')\n"
        "created, used = ctypes.c_void_p(), ctypes.c_void_p()\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))\n"
        "assert active.value == 1\n"
        "driver.cuDevicePrimaryCtxRetain(ctypes.byref(created), 0)\n"
        "import torch; assert torch.ones(2, device='cuda').sum() == 2\n"
        "driver.cuCtxGetCurrent(ctypes.byref(used))\n"
        "assert used.value == created.value != None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
