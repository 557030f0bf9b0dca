"""Results of trials, read from the metrics of their runs: a table and results.csv."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gptforge.files import atomic_write
from gptforge.report.format import markdown_table
from gptforge.report.metrics import METRICS, read_history
from gptforge.sweep.space import Values, format_value
from gptforge.train.signals import EXIT_CODES

COLUMNS = ("val_loss", "val_loss_std", "val_bpb", "best_step", "seconds", "error")


class RunResult(NamedTuple):
    """A finished run."""

    evals: Mapping[
        int, tuple[float, float]
    ]  # step -> held-out loss in nats per token, bits per byte
    seconds: float  # of training, evaluations included
    final: tuple[float, float] | None = None
    """The same of the best checkpoint on all held-out text, as `gptforge eval` prints it."""


@dataclass(frozen=True)
class TrialResult:
    """A trial with the best checkpoint of each seed."""

    trial: str
    values: Values
    losses: tuple[float, ...] = ()  # held-out loss of each seed; empty if a run has not finished
    step: int = 0  # where the mean held-out loss over the seeds is lowest
    bits_per_byte: float = float("nan")
    seconds: float = 0.0
    error: str = ""  # of a failed run

    @property
    def loss(self) -> float:
        """Mean held-out loss; infinite if there is none, so that it sorts last."""
        return statistics.fmean(self.losses) if self.losses else float("inf")

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else 0.0

    @property
    def label(self) -> str:
        """Loss and spread, for people."""
        return f"{self.loss:.4f}" + f" ± {self.spread:.4f}" * (len(self.losses) > 1)


def read_result(folder: Path) -> RunResult | None:
    """The result of a run; None if it is not finished, or has no finite held-out loss.

    Early stopping and the time limit finish a run, too; a signal does not.
    """
    history = read_history(folder / METRICS)
    if EXIT_CODES.get(history.end.get("reason", "interrupted"), 1) != 0:
        return None
    evals = {
        int(event["step"]): (float(event["val_loss"]), float(event["val_bpb"]))
        for event in history.scored_evals
    }
    final = None
    if history.final:
        final = history.final["final_val_loss"], history.final["final_val_bpb"]
    return RunResult(evals, float(history.end.get("seconds", 0)), final) if evals else None


def trial_result(
    trial: str,
    values: Values,
    runs: Sequence[RunResult | None],
    *,
    step: int | None = None,
    use_final: bool = False,
    error: str = "",
) -> TrialResult:
    """Combine the runs of a trial, one for each seed; without a loss if one of them has none.

    The losses are those at the step with the lowest mean, or at `step`; with `use_final`, those of
    each run's best checkpoint on all held-out text.
    """
    results = [run for run in runs if run is not None]
    steps = set.intersection(*(set(run.evals) for run in results)) if results else set()
    steps &= steps if step is None else {step}
    if not steps or len(results) < len(runs):
        return TrialResult(trial, values, error=error)
    step = min(steps, key=lambda step: sum(run.evals[step][0] for run in results))
    scores = [run.final if use_final and run.final else run.evals[step] for run in results]
    losses, bits_per_byte = zip(*scores, strict=True)
    seconds = statistics.fmean(run.seconds for run in results)
    return TrialResult(trial, values, losses, step, statistics.fmean(bits_per_byte), seconds)


def write_results(folder: Path, results: Sequence[TrialResult]) -> None:
    """Write results.csv."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_rows(results))
    atomic_write(folder / "results.csv", text.getvalue())


def table(results: Sequence[TrialResult]) -> str:
    """The rows of results.csv as a Markdown table."""
    return markdown_table(_rows(results))


def _rows(results: Sequence[TrialResult]) -> list[list[str]]:
    rows = [["trial", *results[0].values, *COLUMNS]]
    for r in results:
        outcome = [""] * 5
        if r.losses:
            spread = f"{r.spread:.6f}" if len(r.losses) > 1 else ""
            outcome = [f"{r.loss:.6f}", spread, f"{r.bits_per_byte:.6f}"]
            outcome += [str(r.step), f"{r.seconds:.1f}"]
        rows.append([r.trial, *map(format_value, r.values.values()), *outcome, r.error])
    return rows
