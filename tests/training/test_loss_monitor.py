import math
from collections.abc import Callable

import torch

from gptforge.training import loss_monitor
from gptforge.training.loss_monitor import LossMonitor


def test_spike_is_measured_against_the_spread_of_recent_losses() -> None:
    monitor = LossMonitor(lag=2, uses_grad_scaler=False)
    quiet = [3.0 + 0.05 * math.sin(7 * i) for i in range(40)]
    anomalies = []
    for step, loss in enumerate([*quiet, 4.5, 3.0, 3.2]):
        anomalies += monitor.update(step, 0, torch.tensor(loss), torch.tensor(1.0))
    anomalies += monitor.flush()
    assert [(anomaly.kind, anomaly.step) for anomaly in anomalies] == [("spike", 40)]


def test_overflow_by_the_loss_scaler_is_no_anomaly() -> None:
    inf, one = torch.tensor(math.inf), torch.tensor(1.0)
    assert LossMonitor(lag=0, uses_grad_scaler=True).update(0, 0, one, inf) == []
    [anomaly] = LossMonitor(lag=0, uses_grad_scaler=False).update(0, 0, one, inf)
    assert anomaly.kind == "not_finite"
    [anomaly] = LossMonitor(lag=0, uses_grad_scaler=True).update(0, 0, inf, inf)
    assert anomaly.bad_steps == 1


def test_loss_is_not_read_before_the_lag(monkeypatch) -> None:
    losses_read = []

    def copy_to_host_async(values: torch.Tensor) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            losses_read.append(float(values[0]))
            return values

        return read

    monkeypatch.setattr(loss_monitor, "copy_to_host_async", copy_to_host_async)
    monitor = LossMonitor(lag=2, uses_grad_scaler=False)
    for step in range(3):
        assert losses_read == []
        assert monitor.update(step, 0, torch.tensor(1.0 + step), torch.tensor(1.0)) == []
    assert losses_read == [1.0]
