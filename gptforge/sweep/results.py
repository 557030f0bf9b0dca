"""Results of trials, read from the metrics of their runs: a table, results.csv and sweep.png."""

import csv
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptforge.checkpoint.out_dir import METRICS
from gptforge.config import FIELDS
from gptforge.files import atomic_write
from gptforge.report.curves import (
    TEXT_COLOR,
    TRAIN_COLOR,
    VAL_COLOR,
    default_style,
    style_frame,
)
from gptforge.report.format import markdown_table
from gptforge.report.metrics import read_history
from gptforge.sweep.space import Values, format_value
from gptforge.training.signals import EXIT_CODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SCALE_RATIO = 8
"""Largest to smallest value from which an axis is logarithmic."""
MAX_LABELS = 8
"""Labels of values that fit on an axis, evenly spaced."""
PANELS_PER_ROW = 3
COLUMNS = ("val_loss", "val_loss_std", "val_bpb", "best_step", "seconds", "error")


class RunResult(NamedTuple):
    """A finished run."""

    evals: Mapping[int, tuple[float, float]]
    """Step -> held-out loss in nats per token, bits per byte."""
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
        spread = f" ± {self.spread:.4f}" if len(self.losses) > 1 else ""
        return f"{self.loss:.4f}{spread}"


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
    if step is not None:
        steps &= {step}
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


@default_style()
def plot_sweep(results: Sequence[TrialResult], *, title: str) -> "Figure":
    """Draw trials with a loss, best first: a panel for each field."""
    from matplotlib.figure import Figure

    fields = list(results[0].values)
    rows, columns = -(-len(fields) // PANELS_PER_ROW), min(len(fields), PANELS_PER_ROW)
    size = (max(7.0, 1 + 3.8 * columns), 1 + 3.6 * rows)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, fields, strict=False):
        _plot_field(axes, results, name)
    for axes in panels.flat[len(fields) :]:
        axes.set_visible(False)
    figure.supylabel("held-out loss, nats per token", fontsize=9, color=TEXT_COLOR)
    # parse_math=False: a file name may contain $.
    figure.suptitle(
        f"{title}: best {results[0].label} of {len(results)} trials", parse_math=False,
        fontsize=12, fontweight="bold", color=TEXT_COLOR,
    )  # fmt: skip
    return figure


def _plot_field(axes: "Axes", results: Sequence[TrialResult], name: str) -> None:
    """Loss against one field, with the spread over seeds; the best is red.

    Lines join trials that differ in this field alone. A trial far above the others is an arrow at
    the top, so that it does not flatten them.
    """
    is_number, best = FIELDS[name] in (int, float), results[0]
    top = best.loss + 4 * (statistics.median(r.loss for r in results) - best.loss)
    top = min(max(top, 1.001 * best.loss), max(r.loss + r.spread for r in results))
    lines: dict[str, list[tuple[Any, float]]] = {}
    for r in sorted(results, key=lambda r: r.values[name]):
        is_above = r.loss > top
        x = r.values[name] if is_number else format_value(r.values[name])
        y, spread, marker = (top, 0.0, "^") if is_above else (r.loss, r.spread, "o")
        color, size = (VAL_COLOR, 9) if r is best else (TRAIN_COLOR, 6)
        axes.errorbar(x, y, spread, fmt=marker, color=color, markersize=size, zorder=3)
        lines.setdefault(repr({**r.values, name: None}), []).append((x, y))
    for points in lines.values():
        axes.plot(*zip(*points, strict=True), color=TRAIN_COLOR, lw=1.2, alpha=0.45)
    if is_number:
        ticks = sorted({float(r.values[name]) for r in results})
        is_log = 0 < LOG_SCALE_RATIO * ticks[0] <= ticks[-1]
        if is_log:
            axes.set_xscale("log")
        positions = [math.log(tick) for tick in ticks] if is_log else ticks
        gap = min((b - a for a, b in itertools.pairwise(positions)), default=0.0)
        # Random values may be too close together for labels.
        if MAX_LABELS * gap >= positions[-1] - positions[0]:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    style_frame(axes, f"{name}, best {format_value(best.values[name])}")
