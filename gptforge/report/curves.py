"""training_curves.png: loss, learning rate, gradient norm and speed of a run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptforge.files import replacing
from gptforge.report.metrics import History, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#22262e"
FAINT = "#9aa1ac"
TRAIN = "#4c78a8"
HELD_OUT = "#d1495b"
OTHERS = {"lr": "#7a6bb0", "norm": "#2a9d8f", "tok_per_sec": "#e09f3e"}


def draw_curves(history: History, path: Path, *, title: str) -> None:
    """Draw what is known so far and put it in place of the picture that was there."""
    # Imported here: drawing is seldom, and matplotlib takes a while to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 3, width_ratios=(1, 1, 0.85))
    # A file name is no formula: $ means itself.
    figure.suptitle(
        title, parse_math=False, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK
    )
    _loss(figure.add_subplot(grid[:, :2]), history)
    panels = [
        ("lr", "learning rate", 1.0),
        ("norm", "gradient norm, before clipping", 1.0),
        ("tok_per_sec", "thousand tokens a second", 1e-3),
    ]
    for row, (name, label, scale) in enumerate(panels):
        axes = figure.add_subplot(grid[row, 2])
        # The first step carries compilation and warm-up: it would squash the rest.
        events = history.train[1:] if name == "tok_per_sec" else history.train
        values = [value * scale for value in numbers(events, name)]
        axes.plot(numbers(events, "step"), values, color=OTHERS[name], linewidth=1.4)
        if any(value > 0 for value in values):
            axes.set_ylim(bottom=0)
        _dress(axes, label)
        if row < 2:
            axes.tick_params(labelbottom=False)
    figure.axes[-1].set_xlabel("step", fontsize=9, color=INK)
    with replacing(path) as partial:
        figure.savefig(partial)


def _loss(axes: "Axes", history: History) -> None:
    steps, losses = numbers(history.train, "step"), numbers(history.train, "loss")
    axes.plot(steps, losses, color=TRAIN, linewidth=1.4, label="training")
    evals = [event for event in history.evals if event.get("val_loss") is not None]
    if evals:
        axes.plot(
            numbers(evals, "step"),
            numbers(evals, "val_loss"),
            color=HELD_OUT,
            linewidth=1.8,
            marker="o",
            markersize=4,
            label="held out",
        )
        _mark_best(axes, evals)
    known = [loss for loss in losses if math.isfinite(loss) and loss > 0]
    if known and max(known) > 20 * min(known):
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=9, color=INK)
    if steps:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")
    _dress(axes, "loss, nats per token")


def _mark_best(axes: "Axes", evals: list[dict[str, Any]]) -> None:
    best = min(evals, key=lambda event: float(event["val_loss"]))
    axes.axhline(best["val_loss"], color=HELD_OUT, linewidth=0.8, linestyle=(0, (1, 3)))
    axes.plot(
        best["step"], best["val_loss"], "o", markersize=10, markerfacecolor="none", color=HELD_OUT
    )
    label = f"best held out {best['val_loss']:.3f}\n{best['val_bpb']:.3f} bits per byte"
    is_right = best["step"] > 0.6 * evals[-1]["step"]
    axes.annotate(
        label,
        (best["step"], best["val_loss"]),
        xytext=(-12 if is_right else 12, 26),
        textcoords="offset points",
        ha="right" if is_right else "left",
        fontsize=10,
        color=HELD_OUT,
    )


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, length=3, width=0.6)
    axes.grid(axis="y", color="#e8eaee", linewidth=0.7)
    axes.set_axisbelow(True)
