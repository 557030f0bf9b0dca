"""The training curves of a run as HTML and SVG: no script, sharp on any screen."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from gptforge.report.duration import in_words
from gptforge.report.metrics import History, numbers, read_history

WIDTH, HEIGHT = 960, 380
LEFT, RIGHT, TOP, BOTTOM = 46, 26, 16, 30
MOST_POINTS = 400
"""More than a screen shows; a long run's page stays small."""

Points = list[tuple[float, float]]


def training(folder: Path, *, total: int) -> str:
    """Figures and losses of the run in `folder`, as they stand.

    Args:
        folder: the run folder.
        total: updates that the run is to make.
    """
    history = read_history(folder / "metrics.jsonl")
    if not history.train:
        return '<div class="training"><p class="empty">This run has left no figures.</p></div>'
    return f'<div class="training">{_tiles(history, total)}{_chart(history)}</div>'


def _tiles(history: History, total: int) -> str:
    last = history.train[-1]
    step = int(last["step"]) + 1
    tiles = [("step", f"{step:,}", f"of {total:,}")]
    scored = [e for e in history.evals if e.get("val_loss") is not None]
    if scored:
        best = min(scored, key=lambda event: float(event["val_loss"]))
        tiles.append(("best held-out loss", f"{best['val_loss']:.3f}", f"at step {best['step']:,}"))
        tiles.append(("bits per byte", f"{best['val_bpb']:.3f}", "held out"))
    tiles.append(("tokens a second", f"{float(last['tok_per_sec'] or 0):,.0f}", "learning"))
    if step < total:
        seconds = (total - step) * float(last["dt_ms"] or 0) / 1e3
        tiles.append(("left", in_words(seconds), "about"))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(about)}</span></div>"
        for name, value, about in tiles
    )
    done = min(1.0, step / max(1, total))
    return (
        f'<div class="tiles">{cells}</div><div class="bar"><i style="width:{done:.1%}"></i></div>'
    )


def _chart(history: History) -> str:
    learned = _points(numbers(history.train, "step"), numbers(history.train, "loss"))
    held_out = _points(numbers(history.evals, "step"), numbers(history.evals, "val_loss"))
    both = learned + held_out
    if not both:
        return ""
    right = max(x for x, _ in both) or 1.0
    low, high = min(y for _, y in both), max(y for _, y in both)
    low, high = low - 0.06 * (high - low or 1), high + 0.04 * (high - low or 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + point[0] / right * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return x, y

    parts = [_grid(low, high, right, place)]
    parts.append(_line([place(point) for point in learned], "learned"))
    parts.append(_line([place(point) for point in held_out], "held"))
    if held_out:
        x, y = place(min(held_out, key=lambda point: point[1]))
        parts.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
    labels = '<div class="keys"><i class="learned"></i>training <i class="held"></i>held out</div>'
    return (
        f'<figure><figcaption>Loss, nats per token {labels}</figcaption><svg viewBox="0 0 {WIDTH} '
        f'{HEIGHT}" role="img" aria-label="Training and held-out loss">{"".join(parts)}</svg>'
        "</figure>"
    )


def _points(xs: Sequence[float], ys: Sequence[float]) -> Points:
    """What can be drawn of a curve, thinned out evenly."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    every = max(1, len(known) // MOST_POINTS)
    return known[::-every][::-1]


def _line(points: Points, kind: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _grid(low: float, high: float, right: float, place: object) -> str:
    assert callable(place)
    lines = []
    for value in _round_values(low, high):
        _, y = place((0.0, value))
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in _round_values(0, right):
        x, _ = place((value, low))
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:,.0f}</text>')
    return "".join(lines)


def _round_values(low: float, high: float) -> list[float]:
    """Four to eight round numbers from `low` to `high`."""
    rough = (high - low or 1) / 5
    size: float = 10.0 ** math.floor(math.log10(rough))
    step = next(size * by for by in (1, 2, 5, 10) if size * by >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
