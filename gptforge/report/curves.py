"""training_curves.png: loss, learning rate, gradient norm and speed of a run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptforge.files import atomic_replace
from gptforge.printable import pluralize
from gptforge.report.metrics import Event, History, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


TEXT_COLOR, MUTED_COLOR = "#22262e", "#9aa1ac"
TRAIN_COLOR, VAL_COLOR = "#4c78a8", "#d1495b"
PANELS = (
    ("lr", "learning rate", "#7a6bb0", "%.3g"),
    ("norm", "gradient norm, before clipping", "#2a9d8f", "%.3f"),
    ("tok_per_sec", "tokens per second", "#b8791f", "%.0f"),
)
"""Field, title, color and number format of the panels besides the losses."""
TICK_STEPS = (1, 2, 2.5, 5, 10)
SMOOTH_FROM = 300  # points from which a noisy curve is drawn faintly, behind its running mean
LOG_SCALE_RATIO = 3  # largest to smallest loss from which the axis is logarithmic
MAX_SPEED_RATIO = 3.0
"""Speeds above this multiple of the median, as after a clock change, are cut off."""


@contextmanager
def default_style() -> Iterator[None]:
    """Draw with matplotlib's own defaults, not with those of a user's matplotlibrc."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        yield


def save_curves(history: History, path: Path, *, title: str) -> None:
    """Draw the curves and replace the file at `path` atomically."""
    save_figure(plot_curves(history, title=title), path)


@default_style()
def save_figure(figure: "Figure", path: Path) -> None:
    """Replace the file at `path` atomically; its suffix says the format."""
    with atomic_replace(path) as partial:
        figure.savefig(partial)


@default_style()
def plot_curves(history: History, *, title: str) -> "Figure":
    """Draw all curves of a run into one figure."""
    figure = new_figure()
    grid = figure.add_gridspec(3, 3, width_ratios=(1, 1, 0.85))
    # parse_math=False: a file name may contain $.
    font: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": TEXT_COLOR}
    figure.suptitle(title, parse_math=False, x=0.012, ha="left", **font)
    train = history.train
    loss, *panels = [
        figure.add_subplot(place) for place in (grid[:, :2], *(grid[row, 2] for row in range(3)))
    ]
    _plot_loss(loss, history)
    for axes, (name, title, color, _) in zip(panels, PANELS, strict=True):
        is_speed = name == "tok_per_sec"
        events = history.timed if is_speed else train
        _plot_series(axes, events, name, color=color, is_noisy=name != "lr")
        if top := axis_top(history, name):
            axes.set_ylim(0, top)
        style_axes(axes, title, is_large=is_speed)
    last = max((int(event["step"]) for event in (*train, *history.evals)), default=0)
    for axes in (loss, *panels):
        axes.set_xlim(-0.02 * max(1, last), 1.02 * max(1, last))
        axes.tick_params(labelbottom=axes in (loss, panels[-1]))
    for axes in (loss, panels[-1]):
        axes.set_xlabel("step", fontsize=9, color=TEXT_COLOR)
    return figure


def axis_top(history: History, name: str) -> float:
    """Top of a panel's axis, which begins at 0: then a constant curve looks constant."""
    events, limit = history.train, math.inf
    if name == "tok_per_sec":
        events, limit = history.timed, MAX_SPEED_RATIO * history.tok_per_sec
    return 1.15 * min(max(filter(math.isfinite, series(events, name)), default=0.0), limit)


def new_figure() -> "Figure":
    """An empty figure for several panels."""
    # Imported here, since matplotlib takes a while to load.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06, wspace=0.03)
    return Figure(figsize=(12, 6.4), dpi=130, facecolor="white", layout=layout)


def _plot_loss(axes: "Axes", history: History) -> None:
    _plot_series(axes, history.train, "loss", color=TRAIN_COLOR, label="training", is_noisy=True)
    evals = history.scored_evals
    if evals:
        axes.plot(
            series(evals, "step"), series(evals, "val_loss"), color=VAL_COLOR, linewidth=1.8,
            marker="o", markersize=4 if len(evals) <= 40 else 2, label=_val_label(history),
        )  # fmt: skip
        _mark_best(axes, history)
    losses = finite_losses(history)
    is_log = needs_log_scale(losses)
    if losses and not is_log:
        margin = max(0.05 * (max(losses) - min(losses)), 0.02 * max(losses))
        axes.set_ylim(min(losses) - margin, max(losses) + margin)
    if axes.lines:
        axes.legend(frameon=False, fontsize=10, labelcolor=TEXT_COLOR, loc="best")
    style_axes(axes, "loss, nats per token", max_ticks=8, is_log=is_log)


def finite_losses(history: History) -> list[float]:
    """All training and held-out losses that are finite."""
    losses = series(history.train, "loss") + series(history.evals, "val_loss")
    return [loss for loss in losses if math.isfinite(loss)]


def needs_log_scale(losses: Sequence[float]) -> bool:
    """Whether the losses span a range for which their axis is logarithmic."""
    return bool(losses) and min(losses) > 0 and max(losses) > LOG_SCALE_RATIO * min(losses)


def _val_label(history: History) -> str:
    """Label of the held-out curve; it says how many tokens were read."""
    subset = history.scored_evals[-1].get("val_tokens", 0)
    if not subset:
        return "held out"
    total = history.final["final_val_tokens"] if history.final else subset
    return f"held out, {subset:,} {f'of {total:,} ' if subset < total else ''}tokens"


def _mark_best(axes: "Axes", history: History) -> None:
    """Circle the best evaluation, and write the loss of the best checkpoint on all held-out text.

    The two may differ: the curve may be of a part of it.
    """
    best = history.best_eval
    assert best is not None
    if best is not history.dropped_best:
        style: dict[str, Any] = {"color": VAL_COLOR, "linewidth": 0.8, "linestyle": (0, (1, 3))}
        axes.axhline(best["val_loss"], **style)
        axes.plot(
            best["step"], best["val_loss"], "o", markersize=10, markerfacecolor="none",
            color=VAL_COLOR,
        )  # fmt: skip
    best = history.best or best
    # Above the axes, where no curve can cross it.
    axes.set_title(
        f"best held out {best['val_loss']:.4f} nats per token, {best['val_bpb']:.4f} bits per "
        f"byte, after {pluralize(best['step'], 'step')}",
        fontsize=10,
        loc="right",
        color=VAL_COLOR,
    )


def _plot_series(
    axes: "Axes", events: Sequence[Event], name: str, *, color: str, label: str | None = None,
    is_noisy: bool = False,
) -> None:  # fmt: skip
    """Plot one field of the events over their steps; a single point gets a marker."""
    steps, values = series(events, "step"), np.array(series(events, name))
    if is_noisy and len(steps) >= SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        axes.plot(steps, running_mean(values), color=color, linewidth=1.6, label=label)
    elif steps:
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps, values, color=color, linewidth=1.5, marker=marker, markersize=4, label=label
        )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values within 1% of all points to each side."""
    reach = max(2, len(values) // 100)
    is_finite = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(is_finite, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0.0], is_finite]))
    index = np.arange(len(values))
    # Equally far to both sides near the ends: else the first mean would hide the initial loss.
    begin = index - np.minimum(reach, index)
    end = np.minimum(index + np.minimum(reach, index) + 1, len(values))
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = (sums[end] - sums[begin]) / (counts[end] - counts[begin])
    return mean


def style_axes(
    axes: "Axes", title: str, *, max_ticks: int = 4, is_log: bool = False, is_large: bool = False
) -> None:
    """Title, grid, scale and ticks of a panel over steps; large values get SI prefixes."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    style_frame(axes, f"{title}, logarithmic" if is_log else title)
    axes.xaxis.set_major_locator(MaxNLocator(max_ticks, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if is_log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1, 2, 5) if high > 30 * low else (1, 1.5, 2, 3, 4, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(max_ticks, steps=TICK_STEPS))
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if is_large else "{x:,g}")


def style_frame(axes: "Axes", title: str) -> None:
    """Title, frame and grid of a panel."""
    axes.set_title(title, fontsize=10, loc="left", color=TEXT_COLOR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED_COLOR)
    axes.tick_params(colors=TEXT_COLOR, labelsize=8.5, length=3, width=0.6)
    axes.grid(axis="y", color="#e8eaee", linewidth=0.7)
    axes.set_axisbelow(True)
