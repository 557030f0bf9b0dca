"""The training tab of the page: metrics of a run, and the picture of its curves."""

import functools
from html import escape
from pathlib import Path

from gptforge.report.format import format_duration
from gptforge.report.metrics import History, read_history

CURVES, METRICS = "training_curves.png", "metrics.jsonl"
ALT = "Loss, learning rate, gradient norm and tokens per second by step"


def training_tab(run_dir: Path, *, max_steps: int) -> str:
    """The tab's HTML; cached until a file changes, since each open page polls it."""
    versions = [_version(run_dir / name) for name in (METRICS, CURVES)]
    return _render(run_dir, max_steps, *versions)


@functools.lru_cache(maxsize=1)
def _render(run_dir: Path, max_steps: int, metrics_version: str, curves_version: str) -> str:
    """Metrics as tiles, and the picture; its version in the URL makes browsers load it again."""
    history = read_history(run_dir / METRICS)
    if not history.train:
        return '<div class="training"><p class="empty">This run has no metrics.</p></div>'
    curves = f'<div class="curves"><img src="{CURVES}?{curves_version}" alt="{ALT}"></div>'
    tiles = _tiles(history, max_steps)
    return f'<div class="training">{tiles}{curves if curves_version else ""}</div>'


def _version(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def _tiles(history: History, max_steps: int) -> str:
    last = history.train[-1]
    step = int(last["step"]) + 1
    tiles = [("step", f"{step:,}", f"of {max_steps:,}")]
    if history.scored_evals:
        best = min(history.scored_evals, key=lambda event: float(event["val_loss"]))
        tiles += [
            ("best val loss", f"{best['val_loss']:.3f}", f"at step {best['step']:,}"),
            ("bits per byte", f"{best['val_bpb']:.3f}", "held-out text"),
        ]
    tiles.append(("tokens per second", f"{float(last['tok_per_sec'] or 0):,.0f}", "training"))
    if step < max_steps:
        seconds = (max_steps - step) * float(last["dt_ms"] or 0) / 1e3
        tiles.append(("time left", format_duration(seconds), "about"))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in tiles
    )
    progress = min(1.0, step / max(1, max_steps))
    return (
        f'<div class="tiles">{cells}</div>'
        f'<div class="bar"><i style="width:{progress:.1%}"></i></div>'
    )
