"""The driver's context, made before torch looks for it; by a driver of the test's own."""

import atexit
import contextlib
import ctypes
import os
import subprocess
import sys
import threading

import pytest
import torch

from gptforge import cli, commands, cuda_prewarm


class Driver:
    """Notes what is asked of it; its second answer may be an error."""

    def __init__(self, error: int = 0) -> None:
        self.asked: list[object] = []
        self._error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802
        self.asked.append(("init", flags))
        return 0

    def cuDeviceGet(self, device, index: int) -> int:  # noqa: N802
        self.asked.append(("device", index))
        return self._error

    def cuDevicePrimaryCtxRetain(self, context, device) -> int:  # noqa: N802
        self.asked.append("context")
        return 0


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: True)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return driver


def wake(device: str) -> None:
    if thread := cuda_prewarm.prewarm_cuda(device):
        thread.join()


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_context_of_the_device_that_was_asked_for_is_made(driver, device, index) -> None:
    wake(device)
    assert driver.asked == [("init", 0), ("device", index), "context"]


def test_each_process_of_torchrun_wakes_its_own(driver, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    wake("auto")
    assert ("device", 2) in driver.asked


def test_a_process_alone_wakes_what_it_asks_for(driver, monkeypatch) -> None:
    # As torchrun leaves it for one process.
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    wake("cuda:1")
    assert ("device", 1) in driver.asked


@pytest.mark.parametrize(
    "device", ["cpu", "mps", "cuda:x", "cuda:-1", "cuda:²", "auto:3", "gpu", ""]
)
def test_nothing_is_woken_for_another_device_or_a_misspelt_one(driver, device) -> None:
    wake(device)
    assert driver.asked == []


def test_a_torch_without_cuda_wakes_nothing(driver, monkeypatch) -> None:
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: False)
    wake("auto")
    assert driver.asked == []


def test_a_driver_that_fails_or_is_missing_is_left_to_torch(driver, monkeypatch) -> None:
    driver._error = 101
    wake("cuda:7")
    assert "context" not in driver.asked

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    cuda_prewarm._retain_primary_context(0)


def test_a_program_that_is_over_waits_a_moment_for_a_slow_driver(monkeypatch) -> None:
    ends = []
    monkeypatch.setattr(atexit, "register", lambda *call: ends.append(call))
    monkeypatch.setattr(cuda_prewarm, "_torch_has_cuda", lambda: True)
    monkeypatch.setattr(cuda_prewarm, "MAX_EXIT_WAIT", 0.01)
    is_over = threading.Event()
    monkeypatch.setattr(cuda_prewarm, "_retain_primary_context", lambda index: is_over.wait(60))
    thread = cuda_prewarm.prewarm_cuda("cuda")
    [(wait, *arguments)] = ends
    wait(*arguments)
    assert thread.is_alive() and thread.daemon
    is_over.set()
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
def test_a_command_wakes_its_device_once_its_flags_are_understood(
    command, device, monkeypatch, capsys
) -> None:
    woken: list[str] = []
    for module in (cli, commands.bench, commands.evaluate, commands.sample):
        monkeypatch.setattr(module, "wake_gpu", woken.append)
    with contextlib.suppress(SystemExit):
        cli.main(command)
    assert woken == ([] if device is None else [device])


def test_whether_torch_has_cuda_is_seen_without_importing_it() -> None:
    assert cuda_prewarm._torch_has_cuda() == (
        torch.version.cuda is not None and sys.platform == "linux"
    )
    look = "import gptforge.waking as w, sys; w._has_cuda(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True, env=os.environ)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_torch_finds_the_context_that_was_made() -> None:
    made = (
        "import ctypes; from gptforge.waking import wake_gpu; wake_gpu('cuda').join()\n"
        "driver, made, used = ctypes.CDLL('libcuda.so.1'), ctypes.c_void_p(), ctypes.c_void_p()\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))\n"
        "assert active.value == 1\n"
        "driver.cuDevicePrimaryCtxRetain(ctypes.byref(made), 0)\n"
        "import torch; assert torch.ones(2, device='cuda').sum() == 2\n"
        "driver.cuCtxGetCurrent(ctypes.byref(used))\n"
        "assert used.value == made.value != None\n"
    )
    subprocess.run([sys.executable, "-c", made], check=True, env=os.environ)
