"""training_curves.png: loss, learning rate, gradient norm and speed of a run."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptforge.files import atomic_replace
from gptforge.report.metrics import History, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TEXT_COLOR = "#22262e"
MUTED_COLOR = "#9aa1ac"
TRAIN_COLOR = "#4c78a8"
VAL_COLOR = "#d1495b"
RATE, NORM, SPEED = "#7a6bb0", "#2a9d8f", "#e09f3e"

ROUND = (1, 2, 2.5, 5, 10)
"""What an axis counts by, times powers of ten."""
MANY = 300
"""Points from which on a noisy line is drawn faintly, with its running mean over it."""
LOG_FROM = 3
"""Times the smallest loss that the largest is, from which on the axis is logarithmic."""
FASTEST = 3.0
"""Times the usual speed that are shown: a clock that was set back must not squash the rest."""


def save_curves(history: History, path: Path, *, title: str) -> None:
    """Draw what is known so far and put it in place of the picture that was there."""
    with atomic_replace(path) as partial:
        plot_curves(history, title=title).savefig(partial)


def plot_curves(history: History, *, title: str) -> "Figure":
    """The picture, with all that is known so far."""
    # Imported here: drawing is seldom, and matplotlib takes a while to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06, wspace=0.03)
    figure = Figure(figsize=(12, 6.4), dpi=130, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3, width_ratios=(1, 1, 0.85))
    # A file name is no formula: $ means itself.
    figure.suptitle(
        title,
        parse_math=False,
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=TEXT_COLOR,
    )
    train = history.train
    loss, rate, norm, speed = places = [
        figure.add_subplot(grid[:, :2]),
        *(figure.add_subplot(grid[row, 2]) for row in range(3)),
    ]
    _loss(loss, history)
    _line(rate, train, "lr", color=RATE)
    _from_zero(rate, series(train, "lr"))
    _dress(rate, "learning rate")
    _line(norm, train, "norm", color=NORM, is_noisy=True)
    _from_zero(norm, series(train, "norm"))
    _dress(norm, "gradient norm, before clipping")
    _speed(speed, train)
    last = max((int(event["step"]) for event in (*train, *history.evals)), default=0)
    for axes in places:
        # The same steps at the same places, all over the picture.
        axes.set_xlim(-0.02 * max(1, last), 1.02 * max(1, last))
        axes.tick_params(labelbottom=axes in (loss, speed))
    for axes in (loss, speed):
        axes.set_xlabel("step", fontsize=9, color=TEXT_COLOR)
    return figure


def _loss(axes: "Axes", history: History) -> None:
    _line(axes, history.train, "loss", color=TRAIN_COLOR, label="training", is_noisy=True)
    evals = [event for event in history.evals if event.get("val_loss") is not None]
    if evals:
        few = len(evals) <= 40
        axes.plot(
            series(evals, "step"),
            series(evals, "val_loss"),
            color=VAL_COLOR,
            linewidth=1.8,
            marker="o",
            markersize=4 if few else 2,
            label="held out",
        )
        _mark_best(axes, evals)
    known = series(history.train, "loss") + series(evals, "val_loss")
    known = [loss for loss in known if math.isfinite(loss)]
    is_log = bool(known) and min(known) > 0 and max(known) > LOG_FROM * min(known)
    if is_log:
        axes.set_yscale("log")
    elif known:
        room = max(0.05 * (max(known) - min(known)), 0.02 * max(known))
        axes.set_ylim(min(known) - room, max(known) + room)
    if axes.lines:
        axes.legend(frameon=False, fontsize=10, labelcolor=TEXT_COLOR, loc="best")
    _dress(axes, "loss, nats per token", most=8, is_log=is_log)


def _mark_best(axes: "Axes", evals: list[dict[str, Any]]) -> None:
    best = min(evals, key=lambda event: float(event["val_loss"]))
    axes.axhline(best["val_loss"], color=VAL_COLOR, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.plot(
        best["step"], best["val_loss"], "o", markersize=10, markerfacecolor="none", color=VAL_COLOR
    )
    # Above the axes no curve can run through it.
    axes.set_title(
        f"best held out {best['val_loss']:.3f}, {best['val_bpb']:.3f} bits per byte, "
        f"after {best['step']:,} step{'s' * (best['step'] != 1)}",
        fontsize=10,
        loc="right",
        color=VAL_COLOR,
    )


def _speed(axes: "Axes", train: list[dict[str, Any]]) -> None:
    # The first step carries compilation and warm-up: it would squash the rest.
    events = train[1:] or train
    speeds = [speed for speed in series(events, "tok_per_sec") if math.isfinite(speed)]
    usual = statistics.median(speeds) if speeds else 0.0
    scale, unit = 1.0, ""
    if usual >= 1e4:
        scale, unit = (1e-6, "million ") if usual >= 1e6 else (1e-3, "thousand ")
    _line(axes, events, "tok_per_sec", color=SPEED, is_noisy=True, scale=scale)
    _from_zero(axes, [scale * min(speed, FASTEST * usual) for speed in speeds])
    _dress(axes, f"{unit}tokens a second")


def _line(
    axes: "Axes",
    events: Sequence[dict[str, Any]],
    name: str,
    *,
    color: str,
    label: str | None = None,
    is_noisy: bool = False,
    scale: float = 1.0,
) -> None:
    """One field of many events over their steps; a single point is seen as well."""
    steps, values = series(events, "step"), np.array(series(events, name)) * scale
    if is_noisy and len(steps) >= MANY:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(steps, _running_mean(values), color=color, linewidth=1.6, label=label)
    elif steps:
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=label
        )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Of the finite ones among a hundredth of all points to each side."""
    reach = max(2, len(values) // 100)
    is_known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(is_known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0.0], is_known]))
    places = np.arange(len(values))
    # A mean that leaned forward would hide how high a loss began.
    begin = places - np.minimum(reach, places)
    end = np.minimum(places + np.minimum(reach, places) + 1, len(values))
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    return mean


def _from_zero(axes: "Axes", values: Sequence[float]) -> None:
    """From nothing to a little above the largest: a level line looks level."""
    largest = max(filter(math.isfinite, values), default=0.0)
    if largest > 0:
        axes.set_ylim(0, 1.15 * largest)


def _dress(axes: "Axes", title: str, *, most: int = 4, is_log: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(title, fontsize=10, loc="left", color=TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=8.5, length=3, width=0.6)
    axes.grid(axis="y", color="#e8eaee", linewidth=0.7)
    axes.set_axisbelow(True)
    # There is no half of a step.
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(_steps))
    if is_log:
        low, high = axes.get_ylim()
        subs = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(most, steps=ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _steps(step: float, _: int) -> str:
    """As short as it can be said: 250, 5,000, 20k, 1.5M."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:,.0f}"
