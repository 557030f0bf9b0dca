"""sweep.png: held-out loss against each swept field."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptforge.config import FIELDS
from gptforge.files import atomic_replace
from gptforge.report.curves import MUTED_COLOR, TEXT_COLOR, TRAIN_COLOR, VAL_COLOR
from gptforge.sweep.results import TrialResult
from gptforge.sweep.space import format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SCALE_RATIO = 8
"""Largest to smallest value from which an axis is logarithmic."""
MAX_LABELS = 8
"""Values of a field that are labeled on its axis."""
PANELS_PER_ROW = 3


def save_plot(results: Sequence[TrialResult], path: Path, *, title: str) -> None:
    """`plot_sweep` into the file at `path`."""
    with atomic_replace(path) as partial:
        plot_sweep(results, title=title).savefig(partial)


def plot_sweep(results: Sequence[TrialResult], *, title: str) -> "Figure":
    """Draw trials with a loss, best first: a panel for each field."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fields = list(results[0].values)
    rows, columns = -(-len(fields) // PANELS_PER_ROW), min(len(fields), PANELS_PER_ROW)
    size = (max(7.0, 1 + 3.8 * columns), 1 + 3.6 * rows)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
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
        if 0 < LOG_SCALE_RATIO * ticks[0] <= ticks[-1]:
            axes.set_xscale("log")
        if len(ticks) <= MAX_LABELS:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
    title = f"{name}, best {format_value(best.values[name])}"
    axes.set_title(title, fontsize=10, loc="left", color=TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=8.5, length=3, width=0.6)
    axes.grid(axis="y", color="#e8eaee", linewidth=0.7)
