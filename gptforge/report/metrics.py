"""metrics.jsonl: one event a line, and reading them back for the curves and the verdict."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from gptforge.files import is_finite_number, open_regular

MAX_BYTES = 2**28
"""Read of a metrics file: its end, which a million lines do not fill."""
MAX_LINE_BYTES = 2**16
"""Bytes of a line; one that is longer is none of ours."""
EVENT_FIELDS = {
    "train": ("step", "loss", "dt_ms", "tok_per_sec", "norm", "lr", "epoch"),
    "eval": ("step", "val_loss", "val_bpb", "epoch"),
}
"""What is read of an event: numbers, or null."""
MAX_TRAIN_EVENTS = 2**14
"""Train events that are taken of a longer run: half as many at least."""


@dataclass
class History:
    """The eval events of a run, in order, and its train events or an even selection of them."""

    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)


def read_history(path: Path, *, pending: str = "") -> History:
    """Events from a metrics file. What is no event, as a crash may leave, is passed over.

    Args:
        path: the file, if there is one. A link is not followed.
        unwritten: lines that are to be added to it.
    """
    history = History()
    for line in downsample(chain(_lines(path), pending.splitlines())):
        event = _event(line)
        if event.get("event") == "train":
            history.train.append(event)
        elif event.get("event") == "eval":
            history.evals.append(event)
    return history


def _lines(path: Path) -> Iterator[str]:
    try:
        file = open_regular(path, follow_symlinks=False)
    except OSError:
        return
    with file:
        size = file.seek(0, 2)
        file.seek(max(0, size - MAX_BYTES))
        while line := file.readline(MAX_LINE_BYTES):
            yield line.decode("utf-8", "replace")


def _event(line: str) -> dict[str, Any]:
    """A train or eval event with all its numbers, null where they are missing; {} for the rest."""
    try:
        event = json.loads(line)
        fields = EVENT_FIELDS[event["event"]]
        event = {"event": event["event"], **{name: event.get(name) for name in fields}}
        event["epoch"] = event["epoch"] or 0.0
    except Exception:
        # A crash leaves half a line; a stranger, anything.
        return {}
    numbers = [event[name] for name in fields if event[name] is not None]
    is_whole = type(event["step"]) is int and 0 <= event["step"] < 2**62
    is_scored = event.get("val_loss") is None or None not in event.values()
    return event if is_whole and is_scored and all(map(is_finite_number, numbers)) else {}


def downsample(lines: Iterable[str]) -> list[str]:
    """The lines that may be evals, all of them, and evenly spaced ones that may be train events.

    A picture shows about a thousand points, and to parse a million lines takes ten seconds. The
    first and the last train event are always there.
    """
    train: list[str] = []
    evals: list[str] = []
    stride = 1
    count = 0
    for line in lines:
        if '"eval"' in line:
            evals.append(line)
        elif '"train"' in line:
            if train and (count - 1) % stride:
                # What was the last is so no more, and lies between two that are kept.
                train.pop()
            train.append(line)
            count += 1
            if len(train) > MAX_TRAIN_EVENTS:
                stride *= 2
                train = train[::2]
    return [*train, *evals]


def series(events: Iterable[dict[str, Any]], name: str) -> list[float]:
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
