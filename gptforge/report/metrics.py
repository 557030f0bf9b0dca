"""metrics.jsonl: one event a line, and reading them back for the curves and the verdict."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from gptforge.files import open_regular

MOST_BYTES = 2**28
"""Read of a metrics file: its end, which a million lines do not fill."""
LONGEST_LINE = 2**16
"""Bytes of a line; one that is longer is none of ours."""


@dataclass
class History:
    """The train and eval events of a run, in order."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)


def read_history(path: Path, *, unwritten: str = "") -> History:
    """Events from a metrics file. A line that is not JSON, as a crash may leave, is passed over.

    Args:
        path: the file, if there is one. A link is not followed.
        unwritten: lines that are to be added to it.
    """
    history = History()
    for line in chain(_lines(path), unwritten.splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            history.train.append(event)
        elif isinstance(event, dict) and event.get("event") == "eval":
            history.evals.append(event)
    return history


def _lines(path: Path) -> Iterator[str]:
    try:
        file = open_regular(path, follow_symlinks=False)
    except OSError:
        return
    with file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MOST_BYTES))
        while line := file.readline(LONGEST_LINE):
            yield line.decode("utf-8", "replace")


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
