"""sweep.png: held-out loss against the swept fields."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptforge.config import FIELDS, Value
from gptforge.files import atomic_replace
from gptforge.report.curves import MUTED_COLOR, TEXT_COLOR, TRAIN_COLOR, VAL_COLOR
from gptforge.sweep.results import TrialResult
from gptforge.sweep.space import Choices, Range, Space, format_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_SCALE_RATIO = 8
"""Largest to smallest value from which an axis is logarithmic."""
MAX_PANELS_PER_ROW = 3
MAX_LABELS = 10
"""Values of a field that are labeled on its axis."""
COLORS = "YlGnBu_r"
GRID_COLOR = "#e8eaee"


def save_plot(results: Sequence[TrialResult], space: Space, path: Path, *, title: str) -> None:
    """Draw trials with a loss, best first, and replace the file at `path`."""
    with atomic_replace(path) as partial:
        plot_sweep(results, space, title=title).savefig(partial)


def plot_sweep(results: Sequence[TrialResult], space: Space, *, title: str) -> "Figure":
    """A heat map for a grid of two fields, else one panel a field."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    swept = [name for name in space if len({repr(r.values[name]) for r in results}) > 1]
    fields = swept or list(space)[:1]
    is_heat_map = len(fields) == 2 and all(isinstance(space[name], Choices) for name in fields)
    rows = 1 if is_heat_map else -(-len(fields) // MAX_PANELS_PER_ROW)
    columns = 1 if is_heat_map else -(-len(fields) // rows)
    size = (7.6, 4.8) if is_heat_map or len(fields) == 1 else (1 + 3.4 * columns, 0.9 + 3.2 * rows)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    if is_heat_map:
        _plot_heat_map(panels[0], results, fields)
    else:
        for axes, name in zip(panels, fields, strict=False):
            is_number = FIELDS[name] in (int, float)
            connect = len(fields) == 1 and is_number
            _plot_field(axes, results, name, space[name], connect=connect)
        for axes in panels[len(fields) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("held-out loss, nats per token", fontsize=9, color=TEXT_COLOR)
    best = results[0]
    spread = f" ± {best.spread:.4f}" if len(best.losses) > 1 else ""
    # parse_math=False: a file name may contain $.
    figure.suptitle(
        f"{title}: best {best.loss:.4f}{spread}, trial {best.trial} of {len(results)}",
        parse_math=False, x=0.012, ha="left", fontsize=12, fontweight="bold", color=TEXT_COLOR,
    )  # fmt: skip
    return figure


def _plot_field(
    axes: "Axes",
    results: Sequence[TrialResult],
    name: str,
    dimension: Choices | Range,
    *,
    connect: bool,
) -> None:
    """Loss of each trial against one field, with the spread over seeds; the best is red.

    A trial far above the others is an arrow at the top, labeled with its loss.
    """
    xs = _positions(axes, [r.values[name] for r in results], name, dimension)
    top = _loss_limit([r.loss for r in results])
    below = [(x, r) for x, r in zip(xs, results, strict=True) if r.loss <= top]
    low = min(r.loss - r.spread for _, r in below)
    high = max(r.loss + r.spread for _, r in below)
    margin = max(0.06 * (high - low), 1e-3 * abs(high))
    axes.set_ylim(low - margin, high + (2 if len(below) < len(results) else 1) * margin)
    style: dict[str, Any] = {"color": TRAIN_COLOR, "alpha": 0.85}
    if connect:
        line = sorted((x, r.loss) for x, r in below)
        axes.plot([x for x, _ in line], [y for _, y in line], linewidth=1.6, **style)
    for x, result in below:
        axes.plot(x, result.loss, "o", markersize=6, mew=0, zorder=3, **style)
        if len(result.losses) > 1:
            axes.errorbar(x, result.loss, result.spread, capsize=2.5, lw=1.2, **style)
    for x, result in zip(xs, results, strict=True):
        if result.loss > top:
            axes.plot(x, high + margin, "^", markersize=6, mew=0, **style)
            axes.annotate(
                f"{result.loss:.3g}", (x, high + margin), (5, -3), textcoords="offset points",
                fontsize=8, color=TEXT_COLOR,
            )  # fmt: skip
    best = results[0]
    axes.axhline(best.loss, color=VAL_COLOR, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    axes.plot(xs[0], best.loss, "o", color=VAL_COLOR, markersize=8, mec="white", mew=1, zorder=4)
    title = f"{name}, best {format_value(best.values[name])}"
    axes.set_title(title, fontsize=10, loc="left", color=TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=8.5, length=3, width=0.6)
    axes.grid(axis="y", color=GRID_COLOR, linewidth=0.7)
    axes.set_axisbelow(True)


def _plot_heat_map(axes: "Axes", results: Sequence[TrialResult], fields: Sequence[str]) -> None:
    """A cell for each pair of values, labeled with the loss."""
    values = {name: _sorted_values([r.values[name] for r in results]) for name in fields}
    y_name, x_name = sorted(fields, key=lambda name: len(values[name]))
    top = _loss_limit([r.loss for r in results])
    grid = [[math.nan] * len(values[x_name]) for _ in values[y_name]]
    low = results[0].loss
    for r in results:
        x, y = values[x_name].index(r.values[x_name]), values[y_name].index(r.values[y_name])
        grid[y][x] = min(r.loss, top)
        spread = f"\n± {r.spread:.3f}" if len(r.losses) > 1 else ""
        is_best = r is results[0]
        is_dark = grid[y][x] - low < 0.45 * (top - low)
        axes.text(
            x, y, f"{r.loss:.3f}{spread}", ha="center", va="center", fontsize=9,
            fontweight="bold" if is_best else "normal",
            color="white" if is_dark else TEXT_COLOR,
        )  # fmt: skip
        if is_best:
            box: dict[str, Any] = {"fill": False, "edgecolor": VAL_COLOR, "linewidth": 2.4}
            from matplotlib.patches import Rectangle

            axes.add_patch(Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, zorder=4, **box))
    failed: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": MUTED_COLOR}
    for y, row in enumerate(grid):
        for x, loss in enumerate(row):
            if math.isnan(loss):
                axes.text(x, y, "failed", **failed)
    image = axes.imshow(grid, cmap=COLORS, aspect="auto", origin="lower", vmin=low, vmax=top)
    for axis, name in ((axes.xaxis, x_name), (axes.yaxis, y_name)):
        axis.set_ticks(range(len(values[name])), [format_value(value) for value in values[name]])
    axes.set_xlabel(x_name, fontsize=10, color=TEXT_COLOR)
    axes.set_ylabel(y_name, fontsize=10, color=TEXT_COLOR)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=TEXT_COLOR, labelsize=9, length=0)
    # White lines between the cells.
    axes.set_xticks([x - 0.5 for x in range(1, len(values[x_name]))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(values[y_name]))], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="minor", length=0)
    is_clipped = any(r.loss > top for r in results)
    extend = "max" if is_clipped else "neither"
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30, extend=extend)
    bar.set_label("held-out loss, nats per token", fontsize=9, color=TEXT_COLOR)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=TEXT_COLOR, labelsize=8.5, length=2)


def _positions(
    axes: "Axes", values: Sequence[Value], name: str, dimension: Choices | Range
) -> list[float]:
    """Where values are on the x axis: their own scale for numbers, else evenly spaced."""
    from matplotlib.ticker import NullLocator

    distinct = _sorted_values(values)
    labels = [format_value(value) for value in distinct]
    if FIELDS[name] not in (int, float):
        axes.set_xticks(range(len(distinct)), labels)
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        return [float(distinct.index(value)) for value in values]
    numbers = [float(value) for value in values]
    low, high = min(numbers), max(numbers)
    is_wide = isinstance(dimension, Choices) and high >= LOG_SCALE_RATIO * low
    if low > 0 and (is_wide or (isinstance(dimension, Range) and dimension.is_log)):
        axes.set_xscale("log")
    if isinstance(dimension, Choices) and len(distinct) <= MAX_LABELS:
        axes.set_xticks([float(value) for value in distinct], labels)
        axes.xaxis.set_minor_locator(NullLocator())
    return numbers


def _sorted_values(values: Sequence[Value]) -> list[Value]:
    return sorted(set(values))


def _loss_limit(losses: Sequence[float]) -> float:
    """Losses above it are drawn at it, so that a diverged trial does not flatten the others."""
    best = min(losses)
    return max(min(max(losses), best + 4 * (statistics.median(losses) - best)), best * 1.001)
