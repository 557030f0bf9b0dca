"""metrics.jsonl: one event a line, and reading them back for the curves and the verdict."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class History:
    """The train and eval events of a run, in order."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)


def read_history(path: Path, *, unwritten: str = "") -> History:
    """Events from a metrics file. A line that is not JSON, as a crash may leave, is passed over.

    Args:
        path: the file, if there is one.
        unwritten: lines that are to be added to it.
    """
    history = History()
    written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in [*written.splitlines(), *unwritten.splitlines()]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            history.train.append(event)
        elif isinstance(event, dict) and event.get("event") == "eval":
            history.evals.append(event)
    return history


def numbers(events: Iterable[dict[str, Any]], name: str) -> list[float]:
    """One field of many events; what is missing or null becomes NaN, a gap in a curve."""
    values = (event.get(name) for event in events)
    return [float("nan") if value is None else float(value) for value in values]


def step_line(event: dict[str, Any]) -> str:
    """A train event in the seed's words."""
    return (
        f"step {event['step']} | loss: {event['loss']:.4f} | dt: {event['dt_ms']:.2f}ms"
        f" | tok/sec: {event['tok_per_sec']:.2f} | norm: {event['norm']:.2f}"
        f" | lr: {event['lr']:.6f}"
    )
