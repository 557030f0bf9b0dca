"""A GPU's driver wakes up while Python is busy with importing torch: both take seconds.

CUDA has one primary context on each device, and torch uses the one that it finds. To make it takes
as long here as it would there, but meanwhile torch is imported.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from pathlib import Path

MAX_EXIT_WAIT = 2.0
"""Seconds that a program which is over waits for its driver: an end in the middle of its start
could take the program down, and some drivers need half a minute."""


def prewarm_cuda(device: str) -> threading.Thread | None:
    """Begin to make the context that torch will look for; None where there is nothing to wake.

    Args:
        device: as `--device` has it. With torchrun, each process wakes its own.
    """
    kind, _, number = device.partition(":")
    if (device != "auto" and kind != "cuda") or not _torch_has_cuda():
        return None
    if not number and os.environ.get("WORLD_SIZE", "1") != "1":
        number = os.environ.get("LOCAL_RANK", "")
    if number and not number.isdecimal():
        # Refused in words further on.
        return None
    thread = threading.Thread(
        target=_retain_primary_context, args=(int(number or 0),), name="waking the GPU", daemon=True
    )
    thread.start()
    atexit.register(_wait_briefly, thread)
    return thread


def _wait_briefly(thread: threading.Thread) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        thread.join(MAX_EXIT_WAIT)


def _torch_has_cuda() -> bool:
    """Whether the torch that is installed is made for CUDA, on Linux; without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None or sys.platform != "linux":
        return False
    return (Path(found.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _retain_primary_context(index: int) -> None:
    # Whatever fails here fails again where torch does it, and is told there.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
