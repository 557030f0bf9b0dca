"""Times training steps, without what happens between them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptforge.device import synchronize
from gptforge.distributed import Comm


class StepTimer:
    """Mean wall time of a step; evaluations, samples and saves are excluded.

    Args:
        device: synchronized before the clock is read.
        comm: its watchdog does not check for stalls in excluded blocks.
    """

    def __init__(self, device: torch.device, comm: Comm) -> None:
        self._device, self._comm = device, comm
        self._start, self._step = 0.0, 0

    def restart(self, step: int) -> None:
        """Start timing with the step after `step`."""
        synchronize(self._device)
        self._start, self._step = time.perf_counter(), step

    def seconds_per_step(self, step: int) -> float:
        """Mean time of the steps up to `step` since the last call or `restart`."""
        start, first = self._start, self._step
        self.restart(step)
        # Avoid a division by zero on a coarse clock.
        return max((self._start - start) / (step - first), 1e-9)

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Exclude a block from the step time and from the watchdog's stall check."""
        synchronize(self._device)
        start = time.perf_counter()
        with self._comm.pause_stall_check():
            yield
        synchronize(self._device)
        self._start += time.perf_counter() - start
