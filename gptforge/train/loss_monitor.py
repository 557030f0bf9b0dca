"""Watching the loss for what should not be there, without making the device wait.

A loss is read a few steps late, when the device has long computed it. The update itself needs no
watcher: `TrainStep` leaves it out, on the device, where a gradient is not finite.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_Reading = Callable[[], tuple[float, float]]

HISTORY = 64
"""Losses that a new one is compared with."""
MIN_HISTORY = 16
"""Fewer than these tell nothing."""
SPIKE_Z_SCORE = 8.0
"""Robust standard deviations above the median that make a spike."""


@dataclass(frozen=True)
class Anomaly:
    """One step that went wrong."""

    kind: Literal["not_finite", "spike"]
    step: int
    position: int
    """Place of its batch in the loader's stream."""
    loss: float
    norm: float
    z_score: float
    """Robust standard deviations above the recent median; infinite where the loss is no number."""
    bad_steps: int
    """Steps in a row, up to this one, whose loss or gradient was not finite."""


class LossMonitor:
    """Remembers recent losses and says which new one is out of line.

    Args:
        lag: steps to wait before a loss is read; 0 where the device computes at once.
        scaled: whether a loss scaler is at work: it tries large scales on purpose, so a gradient
            that overflows under a finite loss is none of our business.
    """

    def __init__(self, *, lag: int, uses_grad_scaler: bool) -> None:
        self._lag = lag
        self._scaled = uses_grad_scaler
        self._unread: deque[tuple[int, int, _Reading]] = deque()
        self._recent: deque[float] = deque(maxlen=HISTORY)
        self._in_a_row = 0

    def update(self, step: int, position: int, loss: Tensor, norm: Tensor) -> list[Anomaly]:
        """Take note of a step; returns what is wrong with those old enough to be read."""
        self._unread.append((step, position, _copy_to_host_async(loss, norm)))
        return self._read(self._lag)

    @property
    def bad_steps(self) -> int:
        """Steps in a row, up to the last one read, whose loss or gradient was not finite."""
        return self._in_a_row

    def reset(self, bad_steps: int = 0) -> None:
        """Start over, in a streak of so many bad steps."""
        self._unread.clear()
        self._recent.clear()
        self._in_a_row = bad_steps

    def flush(self) -> list[Anomaly]:
        """Read all that is left."""
        return self._read(0)

    def _read(self, leave: int) -> list[Anomaly]:
        found = []
        while len(self._unread) > leave:
            step, position, reading = self._unread.popleft()
            anomaly = self._examine(step, position, *reading())
            if anomaly is not None:
                found.append(anomaly)
        return found

    def _examine(self, step: int, position: int, loss: float, norm: float) -> Anomaly | None:
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._scaled):
            self._in_a_row += 1
            return Anomaly("not_finite", step, position, loss, norm, math.inf, self._in_a_row)
        self._in_a_row = 0
        score = robust_z_score(loss, self._recent)
        self._recent.append(loss)
        if score > SPIKE_Z_SCORE:
            return Anomaly("spike", step, position, loss, norm, score, 0)
        return None


def _copy_to_host_async(loss: Tensor, norm: Tensor) -> _Reading:
    """Start two scalars on their way from the device; the result waits for their arrival alone.

    Reading a scalar from the device itself would wait for all that was queued behind it, too.
    """
    if loss.device.type != "cuda":
        return lambda: (float(loss), float(norm))
    host = torch.empty(2, pin_memory=True)
    host.copy_(torch.stack((loss.float(), norm.float())), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(loss.device))

    def read() -> tuple[float, float]:
        arrived.synchronize()
        return float(host[0]), float(host[1])

    return read


def robust_z_score(value: float, recent: "deque[float]") -> float:
    """How far `value` lies above the median of `recent`, in robust standard deviations.

    The spread is 1.4826 times the median absolute deviation, which one wild value cannot move
    (Rousseeuw and Croux, 1993), and at least one percent of the median: a loss that has come to
    rest wobbles by less than that.
    """
    if len(recent) < MIN_HISTORY:
        return 0.0
    middle = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(other - middle) for other in recent)
    return (value - middle) / max(spread, 0.01 * abs(middle), 1e-12)
