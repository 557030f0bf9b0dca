"""The training curves of a run as HTML and SVG: no script, sharp on any screen.

Lines are SVG, stretched to whatever room there is; what is written stays HTML, so that it can be
read on a phone too. Places are shares of the drawing, in percent, from its upper left corner.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gptforge.report.format import format_duration
from gptforge.report.metrics import History, read_history, series

MOST_POINTS = 400
"""More than a screen shows; a long run's page stays small."""
ROUND = (1, 1.5, 2, 3, 4, 5, 7)
"""What a logarithmic axis is marked at, times powers of ten."""

SMALLEST = 1e-100
"""Loss from which on a logarithmic axis can be marked: near the smallest float marks become 0."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    kind: str
    """Its class in the style sheet."""
    points: Points


def render_training(folder: Path, *, max_steps: int) -> str:
    """Figures and curves of the run in `folder`, as they stand.

    Args:
        folder: the run folder.
        total: updates that the run is to make.
    """
    history = read_history(folder / "metrics.jsonl")
    if not history.train:
        return '<div class="training"><p class="empty">This run has left no figures.</p></div>'
    steps = series(history.train, "step")

    def line(name: str, kind: str, field: str) -> Line:
        return Line(name, kind, _points(steps, series(history.train, field)))

    scores = _points(series(history.evals, "step"), series(history.evals, "val_loss"))
    loss = [line("training", "learned", "loss"), Line("held out", "held", scores)]
    charts = [
        _chart("Loss, nats per token", loss, kind="tall", is_log=True),
        _chart("Learning rate", [line("", "plain", "lr")]),
        _chart("Gradient norm", [line("", "plain", "norm")]),
        _chart("Tokens a second", [line("", "plain", "tok_per_sec")]),
    ]
    return f'<div class="training">{_tiles(history, max_steps)}{"".join(charts)}</div>'


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
        tiles.append(("left", format_duration(seconds), "about"))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(about)}</span></div>"
        for name, value, about in tiles
    )
    done = min(1.0, step / max(1, total))
    return (
        f'<div class="tiles">{cells}</div><div class="bar"><i style="width:{done:.1%}"></i></div>'
    )


def _chart(title: str, lines: Sequence[Line], *, kind: str = "", is_log: bool = False) -> str:
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    right = max(x for line in lines for x, _ in line.points) or 1.0
    values = [y for line in lines for _, y in line.points]
    # A loss falls fast and then slowly: on a logarithmic axis both can be seen.
    bend: Callable[[float], float] = math.log if is_log and min(values) > SMALLEST else float
    low, high = bend(min(values)), bend(max(values))
    margin = 0.05 * (high - low or abs(high) or 1)
    low, high = low - margin, high + margin

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return 100 * point[0] / right, 100 * (high - bend(point[1])) / (high - low)

    marks = _log_marks(low, high) if bend is math.log else _marks(low, high)
    rows = [(place((0, value))[1], _short(value)) for value in marks]
    columns = [(place((value, values[0]))[0], _short(value)) for value in _marks(0, right)]
    grid = "".join(f'<line x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}"/>' for y, _ in rows)
    drawn = "".join(_polyline([place(p) for p in line.points], line.kind) for line in lines)
    labels = "".join(f'<span class="y" style="top:{y:.2f}%">{text}</span>' for y, text in rows)
    labels += "".join(f'<span class="x" style="left:{x:.2f}%">{text}</span>' for x, text in columns)
    for line in lines:
        if line.kind == "held":
            x, y = place(min(line.points, key=lambda point: point[1]))
            labels += f'<i class="best" style="left:{x:.2f}%;top:{y:.2f}%"></i>'
    keys = "".join(
        f'<span><i class="{line.kind}"></i>{line.name}</span>' for line in lines if line.name
    )
    return (
        f'<figure class="{kind}"><figcaption>{title}<span class="keys">{keys}</span></figcaption>'
        f'<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}">{grid}{drawn}</svg>{labels}</div></figure>'
    )


def _points(xs: Sequence[float], ys: Sequence[float]) -> Points:
    """What can be drawn of a curve, thinned out evenly."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    every = max(1, len(known) // MOST_POINTS)
    return known[::-every][::-1]


def _polyline(points: Points, kind: str) -> str:
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"/>'


def _marks(low: float, high: float) -> list[float]:
    """Three to five round numbers from `low` to `high`."""
    rough = (high - low or 1) / 4
    size: float = 10.0 ** math.floor(math.log10(rough))
    step = next(size * by for by in (1, 2, 5, 10) if size * by >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Round numbers whose logarithms lie between `low` and `high`; even ones if there are few."""
    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    found = [m * 10.0**p for p in powers for m in ROUND if low <= math.log(m * 10.0**p) <= high]
    return found if len(found) > 1 else _marks(math.exp(low), math.exp(high))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
