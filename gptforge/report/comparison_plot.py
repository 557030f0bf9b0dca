"""The picture of `gptforge compare`: the curves of all runs, and their best losses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptforge.printable import printable
from gptforge.report.comparison import METRIC_NAMES, Comparison, Group
from gptforge.report.curves import (
    TEXT_COLOR,
    default_style,
    needs_log_scale,
    new_figure,
    running_mean,
    style_axes,
)
from gptforge.report.metrics import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    *("#4c78a8", "#d1495b", "#2a9d8f", "#b8791f", "#7a6bb0", "#5b8c3a", "#c0628f", "#6b7280"),
    *("#1f4e79", "#8c2f39"),
)
MAX_NAME = 44  # characters of a name in the legend


@default_style()
def plot_comparison(comparison: Comparison) -> "Figure":
    """Draw held-out and training loss by step, and the best losses; one color for each group."""
    metric, figure = comparison.metric or "val_loss", new_figure()
    grid = figure.add_gridspec(2, 2, width_ratios=(1.55, 1), height_ratios=(1.25, 1))
    val, train, best = map(figure.add_subplot, (grid[:, 0], grid[0, 1], grid[1, 1]))
    colors = [COLORS[index % len(COLORS)] for index in range(len(comparison.groups))]
    for group, color in zip(comparison.groups, colors, strict=True):
        for index, run in enumerate(group.runs):
            style: dict[str, Any] = {"color": color, "linewidth": 1.4, "alpha": 0.9}
            evals, steps = run.history.scored_evals, series(run.history.train, "step")
            marker = "o" if len(evals) <= 40 else None
            label = "_" if index else _label(group)  # not in the legend, or once
            xy = series(evals, "step"), series(evals, metric)
            val.plot(*xy, marker=marker, markersize=2.8, label=label, **style)
            smoothed = running_mean(np.array(series(run.history.train, "loss")))
            train.plot(steps, smoothed, marker="o" if len(steps) == 1 else None, **style)
    units = METRIC_NAMES[metric] + (", nats per token" if metric == "val_loss" else "")
    _finish(val, units, [e[metric] for r in comparison.runs for e in r.history.scored_evals])
    losses = [e["loss"] for r in comparison.runs for e in r.history.train if e["loss"] is not None]
    _finish(train, "training loss, smoothed", losses)
    _plot_best(best, comparison.groups, colors, metric)
    # parse_math=False: a file name may contain $.
    legend = val.legend(frameon=False, fontsize=9.5, labelcolor=TEXT_COLOR, loc="upper right")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _label(group: Group) -> str:
    spread = "" if group.spread is None else f" ± {group.spread:.4f}"
    score = f": {group.mean:.4f}{spread}" if group.scores else ""
    return printable(group.name, MAX_NAME) + score


def _finish(axes: "Axes", title: str, losses: list[float]) -> None:
    style_axes(axes, title, max_ticks=7, is_log=needs_log_scale(losses))
    axes.set_xlabel("step", fontsize=9, color=TEXT_COLOR)


def _plot_best(axes: "Axes", groups: Sequence[Group], colors: Sequence[str], metric: str) -> None:
    """A row for each group, the best on top: its runs as dots, and mean and spread over seeds."""
    for row, (group, color) in enumerate(zip(groups, colors, strict=True)):
        values = [best[metric] for run in group.runs if (best := run.history.best)]
        axes.plot(values, [row] * len(values), "o", color=color, markersize=6, alpha=0.75)
        if group.spread is not None:
            style: dict[str, Any] = {"color": color, "marker": "|", "markersize": 16, "capsize": 4}
            axes.errorbar(group.mean, row, xerr=group.spread, **style)
        name = printable(group.name, MAX_NAME)
        place = axes.get_yaxis_transform()  # x as a fraction of the width
        font: dict[str, Any] = {"fontsize": 9, "color": TEXT_COLOR, "parse_math": False}
        axes.text(0, row - 0.22, name, transform=place, **font)
    style_axes(axes, f"best {METRIC_NAMES[metric]}, mean and spread over seeds")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks([])
    axes.set_ylim(len(groups) - 0.5, -0.7)
    axes.margins(x=0.1)
    axes.spines["left"].set_visible(False)
