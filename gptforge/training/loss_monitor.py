"""Detects NaN, Inf and spikes in the loss without a sync.

Each loss is read a few steps late, when the device has already computed it. The delay is harmless:
`optimizer_step` skips a step with NaN or Inf on the device (like OLMo-core's SkipStep).
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptforge.device import copy_to_host_async
from gptforge.training.state import TrainState

HISTORY = 64  # recent losses that a new one is compared with
MIN_HISTORY = 16  # losses to collect before spikes are reported
# Far beyond 3, since the losses of steps have heavier tails than a normal distribution.
SPIKE_Z_SCORE = 8.0


@dataclass(frozen=True)
class Anomaly:
    """A step whose loss is a spike, or whose loss or gradient is NaN or Inf."""

    kind: Literal["not_finite", "spike"]
    step: int
    position: int  # dataloader position of the step's batch
    loss: float
    norm: float
    # Robust standard deviations above the recent median; infinite if the loss is not finite.
    z_score: float
    bad_steps: int  # consecutive steps, up to this one, whose loss or gradient was not finite


class LossMonitor:
    """Compares each loss with the recent ones.

    Args:
        lag: steps to wait before a loss is read; 0 where the device is synchronous.
        uses_grad_scaler: do not report an infinite gradient with a finite loss: a loss scaler
            raises its scale until gradients overflow.
    """

    def __init__(self, *, lag: int, uses_grad_scaler: bool) -> None:
        self._lag = lag
        self._uses_grad_scaler = uses_grad_scaler
        self._unread: deque[tuple[int, int, Callable[[], Tensor]]] = deque()
        self._recent: deque[float] = deque(maxlen=HISTORY)
        self.losses: deque[float] = deque(maxlen=0)  # the last losses read, see `reset`
        self.last_loss = math.nan
        self.bad_steps = 0
        """Consecutive steps, up to the last one read, whose loss or gradient was not finite."""

    def update(self, step: int, position: int, loss: Tensor, norm: Tensor) -> list[Anomaly]:
        """Add a step; returns the anomalies among those old enough to be read."""
        self._unread.append((step, position, copy_to_host_async(torch.stack((loss, norm)))))
        return self.flush(self._lag)

    def flush(self, num_unread: int = 0) -> list[Anomaly]:
        """Read all steps but the last few, which waits for the device; returns their anomalies."""
        anomalies = []
        while len(self._unread) > num_unread:
            step, position, read = self._unread.popleft()
            if anomaly := self._check(step, position, *read().tolist()):
                anomalies.append(anomaly)
        return anomalies

    def reset(self, state: TrainState, *, keep_losses: int) -> None:
        """Start over from `state`, which has the losses of earlier steps.

        Args:
            state: its `loss`, `recent_losses` and `bad_steps` are taken.
            keep_losses: number of the latest losses to keep in `losses`.
        """
        self._unread.clear()
        self._recent.clear()
        self.bad_steps, self.last_loss = state.bad_steps, state.loss
        self.losses = deque(state.recent_losses, maxlen=keep_losses)

    def mean_loss(self) -> float:
        """Mean of those of the last losses that are finite, else NaN."""
        if self.bad_steps:
            return math.nan  # earlier losses are no estimate for these weights
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def _check(self, step: int, position: int, loss: float, norm: float) -> Anomaly | None:
        self.last_loss = loss
        self.losses.append(loss)
        if not math.isfinite(loss) or not (math.isfinite(norm) or self._uses_grad_scaler):
            self.bad_steps += 1
            return Anomaly("not_finite", step, position, loss, norm, math.inf, self.bad_steps)
        self.bad_steps = 0
        z_score = robust_z_score(loss, self._recent)
        # Spikes enter the history too, so that a lasting jump of the loss stops being reported.
        self._recent.append(loss)
        if z_score > SPIKE_Z_SCORE:
            return Anomaly("spike", step, position, loss, norm, z_score, 0)
        return None


def robust_z_score(value: float, recent: Collection[float]) -> float:
    """Robust standard deviations of `value` above the median of `recent`.

    The deviation is 1.4826 times the median absolute deviation, which outliers do not move
    (Rousseeuw and Croux, 1993), and at least 1% of the median: a converged loss varies by less.
    """
    if len(recent) < MIN_HISTORY:
        return 0.0
    median = statistics.median(recent)
    # 1.4826 = 1 / Phi^-1(3/4) makes the MAD of a normal distribution its standard deviation.
    deviation = 1.4826 * statistics.median(abs(other - median) for other in recent)
    return (value - median) / max(deviation, 0.01 * abs(median), 1e-12)
