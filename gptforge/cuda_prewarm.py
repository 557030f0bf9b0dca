"""Initialize the CUDA driver in a thread while Python imports torch: both take seconds.

CUDA has one primary context per device, and torch uses the one it finds. Creating it takes as long
here as in torch, but overlaps with the import.
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
"""Seconds to wait for the driver at exit: exiting in the middle of initialization can crash the
process, and some drivers take half a minute."""


def prewarm_cuda(device: str) -> threading.Thread | None:
    """Start creating the CUDA context that torch will use; None if there is nothing to do.

    Args:
        device: `--device`. Under torchrun each process prewarms the GPU of its local rank.
    """
    kind, _, index = device.partition(":")
    if (device != "auto" and kind != "cuda") or not _torch_has_cuda():
        return None
    if not index and os.environ.get("WORLD_SIZE", "1") != "1":
        index = os.environ.get("LOCAL_RANK", "")
    if index and not index.isdecimal():
        # select_device reports it.
        return None
    thread = threading.Thread(
        target=_retain_primary_context, args=(int(index or 0),), name="cuda-prewarm", daemon=True
    )
    thread.start()
    atexit.register(_wait_briefly, thread)
    return thread


def _wait_briefly(thread: threading.Thread) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        thread.join(MAX_EXIT_WAIT)


def _torch_has_cuda() -> bool:
    """Whether a CUDA build of torch is installed, on Linux; does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or sys.platform != "linux":
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


def _retain_primary_context(index: int) -> None:
    # Errors are ignored: torch runs into the same ones later, and reports them.
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
