"""The driver's context, made before torch looks for it; by a driver of the test's own."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from gptforge import waking


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
    monkeypatch.setattr(waking, "_has_cuda", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return driver


def wake(device: str) -> None:
    if thread := waking.wake_gpu(device):
        thread.join()


@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda", 0), ("cuda:3", 3)])
def test_the_context_of_the_device_that_was_asked_for_is_made(driver, device, index) -> None:
    wake(device)
    assert driver.asked == [("init", 0), ("device", index), "context"]


def test_each_process_of_torchrun_wakes_its_own(driver, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    wake("auto")
    assert ("device", 2) in driver.asked


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda:x", "cuda:-1", "gpu", ""])
def test_nothing_is_woken_for_another_device_or_a_misspelt_one(driver, device) -> None:
    wake(device)
    assert driver.asked == []


def test_a_torch_without_cuda_wakes_nothing(driver, monkeypatch) -> None:
    monkeypatch.setattr(waking, "_has_cuda", lambda: False)
    wake("auto")
    assert driver.asked == []


def test_a_driver_that_fails_or_is_missing_is_left_to_torch(driver, monkeypatch) -> None:
    driver._error = 101
    wake("cuda:7")
    assert "context" not in driver.asked

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    wake("cuda")


def test_whether_torch_has_cuda_is_seen_without_importing_it() -> None:
    assert waking._has_cuda() == (torch.version.cuda is not None and sys.platform == "linux")
    look = "import gptforge.waking as w, sys; w._has_cuda(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", look], check=True, env=os.environ)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_torch_finds_the_context_that_was_made() -> None:
    made = (
        "import ctypes; from gptforge.waking import wake_gpu; wake_gpu('cuda').join()\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "state = ctypes.CDLL('libcuda.so.1').cuDevicePrimaryCtxGetState\n"
        "state(0, ctypes.byref(flags), ctypes.byref(active))\n"
        "assert active.value == 1\n"
        "import torch; assert torch.ones(2, device='cuda').sum() == 2\n"
    )
    subprocess.run([sys.executable, "-c", made], check=True, env=os.environ)
