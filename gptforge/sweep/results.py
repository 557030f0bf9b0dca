"""Results of trials, read from the metrics of their runs: table, CSV and JSON lines."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptforge.files import atomic_write, json_line, open_regular
from gptforge.report.format import format_duration
from gptforge.report.metrics import read_history
from gptforge.sweep.space import Values, format_value
from gptforge.train.signals import EXIT_CODES

METRICS = "metrics.jsonl"
MAX_EVENT_BYTES = 2**12
"""Longer than any end event."""


@dataclass(frozen=True)
class RunResult:
    """Evaluations of a finished run.

    Attributes:
        evals: held-out loss in nats per token and bits per byte, by step.
        seconds: of training, evaluations included.
    """

    evals: Mapping[int, tuple[float, float]]
    seconds: float


@dataclass(frozen=True)
class TrialResult:
    """A trial at the step where the mean held-out loss over its seeds is lowest.

    Attributes:
        losses: held-out loss of each seed at that step; empty if no run finished.
        error: of a failed run; empty if none failed.
    """

    trial: int
    values: Values
    seeds: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    step: int = 0
    bits_per_byte: float = float("nan")
    seconds: float = 0.0
    error: str = ""

    @property
    def loss(self) -> float:
        """Mean held-out loss; infinite if a seed is missing, so that it sorts last."""
        return statistics.fmean(self.losses) if self.losses else float("inf")

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0


def read_result(folder: Path) -> RunResult | None:
    """The result of a run; None if it is not finished, or has no finite held-out loss.

    Early stopping and the time limit finish a run, too; a signal does not.
    """
    end = _end_event(folder / METRICS)
    if EXIT_CODES.get(end.get("reason", "interrupted")) != 0:
        return None
    evals = {
        int(event["step"]): (float(event["val_loss"]), float(event["val_bpb"]))
        for event in read_history(folder / METRICS).scored_evals
    }
    return RunResult(evals, float(end.get("seconds", 0))) if evals else None


def trial_result(
    trial: int, values: Values, runs: Mapping[int, RunResult | None], *, error: str = ""
) -> TrialResult:
    """Combine the runs of a trial, by seed; without a loss if one of them has none."""
    results = [result for result in runs.values() if result is not None]
    steps = set.intersection(*(set(result.evals) for result in results)) if results else set()
    if not steps or len(results) < len(runs):
        return TrialResult(trial, values, error=error)
    step = min(steps, key=lambda step: sum(result.evals[step][0] for result in results))
    return TrialResult(
        trial,
        values,
        seeds=tuple(runs),
        losses=tuple(result.evals[step][0] for result in results),
        step=step,
        bits_per_byte=statistics.fmean(result.evals[step][1] for result in results),
        seconds=statistics.fmean(result.seconds for result in results),
        error=error,
    )


def write_results(folder: Path, results: Sequence[TrialResult]) -> None:
    """Write results.csv and results.jsonl, best first."""
    rows = [_row(result) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.remove("val_losses")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder / "results.csv", text.getvalue())
    atomic_write(folder / "results.jsonl", "".join(map(json_line, rows)))


def table(results: Sequence[TrialResult], fields: Sequence[str]) -> str:
    """Results as a Markdown table, in the order given."""
    header = ["trial", *fields, "held-out loss", "bits per byte", "best step", "time"]
    rows = [header, ["---"] * len(header)]
    for r in results:
        values = [format_value(r.values[name]) for name in fields]
        outcome = ["failed" if r.error else "not finished", "", "", ""]
        if r.losses:
            loss = f"{r.loss:.4f}" + f" ± {r.spread:.4f}" * (len(r.losses) > 1)
            bits = f"{r.bits_per_byte:.4f}"
            outcome = [loss, bits, f"{r.step:,}", format_duration(r.seconds)]
        rows.append([str(r.trial), *values, *outcome])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def _row(result: TrialResult) -> dict[str, object]:
    has_loss = bool(result.losses)
    return {
        "trial": result.trial,
        **result.values,
        "val_loss": result.loss if has_loss else None,
        "val_loss_std": result.spread if len(result.losses) > 1 else None,
        "val_bpb": result.bits_per_byte if has_loss else None,
        "best_step": result.step if has_loss else None,
        "seconds": result.seconds if has_loss else None,
        "seeds": len(result.losses),
        "val_losses": dict(zip(map(str, result.seeds), result.losses, strict=True)),
        "error": result.error,
    }


def _end_event(path: Path) -> dict[str, Any]:
    """The last line of the metrics if it is an end event, else empty."""
    try:
        with open_regular(path, follow_symlinks=False) as file:
            file.seek(max(0, file.seek(0, 2) - MAX_EVENT_BYTES))
            event = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return event if isinstance(event, dict) and event.get("event") == "end" else {}
