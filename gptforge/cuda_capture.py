"""Capture of CUDA graphs without interference from garbage collection and other threads."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUDA_CAPTURE_LOCK = threading.Lock()
"""Held during a capture, and by a thread that saves a checkpoint: captures failed beside one."""


@contextmanager
def cuda_graph_capture(graph: "torch.cuda.CUDAGraph") -> Iterator[None]:
    """Capture the CUDA calls of this thread, once no other thread holds `CUDA_CAPTURE_LOCK`.

    Python's garbage collection waits: if it destroyed another graph, that would invalidate the
    capture (pytorch/pytorch#161037).
    """
    with CUDA_CAPTURE_LOCK:
        collects_garbage = gc.isenabled()
        gc.disable()
        try:
            # cuBLAS then allocates a workspace in the memory of this graph. Otherwise it uses that
            # of an earlier graph, which is freed together with that graph (pytorch/pytorch#193402).
            torch._C._cuda_clearCublasWorkspaces()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                yield
        finally:
            if collects_garbage:
                gc.enable()
