"""Where runs of a sweep train, and how many at a time."""

import torch

from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.config import Config
from gptforge.device import select_device, select_precision
from gptforge.train.micro_batch_search import MAX_MEMORY_FRACTION

MAX_JOBS_PER_GPU = 4
CONTEXT_BYTES = 10**9
"""GPU memory of a process before it allocates anything: the CUDA context and libraries."""


def find_devices(config: Config) -> list[str]:
    """Devices that runs take in turns: all GPUs, unless one is named."""
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return [f"cuda:{i}" for i in range(count)] if count > 1 else [config.device]


def jobs_per_device(config: Config, *, is_explicit: bool) -> int:
    """Runs at a time that fit into the memory of a GPU; 1 on other devices.

    Args:
        config: the largest one, resolved.
        is_explicit: whether the user set `batch_size`.
    """
    device, _ = select_device(config.device)
    if device.type != "cuda":
        return 1
    estimator = MemoryEstimator(config, select_precision(config.dtype, device), device)
    micro_batch = config.batch_size if is_explicit else estimator.micro_batch()
    memory = estimator.estimate(micro_batch, str(device))
    free = MAX_MEMORY_FRACTION * (memory.free_bytes or 0)
    fitting = int(free // (memory.needed_bytes + CONTEXT_BYTES))
    return max(1, min(MAX_JOBS_PER_GPU, fitting))
