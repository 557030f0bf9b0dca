"""TODO"""

from functools import cache

import torch


def tile_shape(columns: int, *, numel: int = 4096) -> tuple[int, int]:
    """Columns and rows that a program works on at a time: so many numbers, or one row."""
    block = 1 << (columns - 1).bit_length()
    return block, max(1, numel // block)


@cache
def num_sms(device: torch.device) -> int:
    """Of a CUDA device: the parts that programs run on."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
