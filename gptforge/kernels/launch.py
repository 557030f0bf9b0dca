"""Launch settings shared by the kernels."""

import os
from functools import cache

import torch
from torch import Tensor


def uses_triton(x: Tensor) -> bool:
    """Whether operations on `x` run as Triton kernels: on CUDA, or in Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def num_sms(device: torch.device) -> int:
    """Number of streaming multiprocessors."""
    if device.type != "cuda":
        return 3  # the interpreter's; any small number
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, the size of a Triton block."""
    return 1 << (n - 1).bit_length()


def tile_shape(columns: int, *, numel: int = 4096) -> tuple[int, int]:
    """Columns and rows of a program's tile: about `numel` elements, or a single row."""
    block = next_power_of_2(columns)
    return block, max(1, numel // block)
