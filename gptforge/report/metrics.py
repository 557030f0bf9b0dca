"""metrics.jsonl: one event per line, read back for the curves and the verdict."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gptforge.checkpoint.out_dir import read_metrics_lines
from gptforge.files import is_count, is_finite_number

MAX_TRAIN_EVENTS = 2**14  # more are downsampled evenly, with the first and the last
FINAL_FIELDS = ("final_val_loss", "final_val_bpb", "final_val_nats_per_char", "final_val_tokens")
"""Fields of the end event: the best checkpoint on all held-out text, as `gptforge eval` prints."""
EVENT_FIELDS = {
    "train": ("step", "loss", "dt_ms", "tok_per_sec", "norm", "lr", "epoch"),
    **dict.fromkeys(
        ("eval", "dropped_best"), ("step", "val_loss", "val_bpb", "val_tokens", "epoch")
    ),
}
"""Fields read per event: numbers, or null."""
RARE_EVENTS = ("start", "resume", "anomaly", "end")
"""Events of which all fields are read; their values are unchecked."""

Event = dict[str, Any]
T = TypeVar("T")


@dataclass
class History:
    """A run's events in order."""

    train: list[Event] = field(default_factory=list)
    evals: list[Event] = field(default_factory=list)
    rare: list[Event] = field(default_factory=list)
    dropped_best: Event | None = None
    """The evaluation of the best checkpoint, if its steps were dropped: it is not among `evals`."""
    final: Event | None = None
    """`best_step` and `FINAL_FIELDS` of the end event; None without an evaluation on all text."""

    @property
    def scored_evals(self) -> list[Event]:
        """Evaluations whose loss was finite."""
        return [event for event in self.evals if event["val_loss"] is not None]

    @property
    def best(self) -> Event | None:
        """`step`, `val_loss`, `val_bpb` and `val_tokens` of the best checkpoint.

        On all held-out text if that is known, else by the best evaluation during training.
        """
        if self.final is None:
            return self.best_eval
        losses = {name.removeprefix("final_"): self.final[name] for name in FINAL_FIELDS}
        return {"step": self.final["best_step"], **losses}

    @property
    def best_eval(self) -> Event | None:
        """The evaluation during training with the lowest loss."""
        evals = [*self.scored_evals, *([self.dropped_best] if self.dropped_best else [])]
        return min(evals, key=lambda event: float(event["val_loss"]), default=None)

    @property
    def steps(self) -> int:
        """Steps made, as far as they were logged."""
        steps = [int(event["step"]) + 1 for event in self.train[-1:]]
        steps += [int(event["step"]) for event in self.evals[-1:]]
        end = self.end.get("step")
        return max([0, *steps, end if type(end) is int else 0])

    @property
    def epochs(self) -> float:
        """Passes over the training text, as far as they were logged."""
        events = self.train[-1:] + self.evals[-1:]
        return max((float(event["epoch"]) for event in events), default=0.0)

    @property
    def timed(self) -> list[Event]:
        """Train events without the first, whose time includes compilation and warmup."""
        return self.train[1:] or self.train

    @property
    def tok_per_sec(self) -> float:
        """Median training speed; 0 if none was logged."""
        speeds = [value for value in series(self.timed, "tok_per_sec") if math.isfinite(value)]
        return statistics.median(speeds or [0.0])

    @property
    def end(self) -> Event:
        """The end event; empty if the run has not ended, or was resumed since."""
        last = self.rare[-1] if self.rare else {}
        return last if last.get("event") == "end" and isinstance(last.get("reason"), str) else {}


def read_history(path: Path, *, pending: str = "") -> History:
    """Read events from a metrics file, skipping malformed lines such as a crash may leave.

    The file may be missing, and a link is not followed; `pending` are lines not in the file yet.
    """
    lines = [*read_metrics_lines(path), *pending.encode().splitlines()]
    train = [line for line in lines if b'"train"' in line]
    others = [line for line in lines if b'"train"' not in line]
    # A plot shows about a thousand points, and parsing a million lines takes ten seconds.
    stride = max(1, -(-len(train) // MAX_TRAIN_EVENTS))
    is_last_left_out = (len(train) - 1) % stride > 0
    events = map(_parse_event, [*train[::stride], *train[-1:] * is_last_left_out, *others])
    history = History()
    dropped: list[Event] = []
    lists = {"train": history.train, "eval": history.evals, "dropped_best": dropped}
    for event in filter(None, events):
        lists.get(event["event"], history.rare).append(event)
    history.dropped_best = next((e for e in reversed(dropped) if e["val_loss"] is not None), None)
    final = {name: history.end.get(name) for name in ("best_step", *FINAL_FIELDS)}
    if all(map(is_finite_number, final.values())) and is_count(final["best_step"]):
        history.final = final
    return history


def _parse_event(line: bytes) -> Event:
    """A train or eval event with all its fields, None where one is missing; {} if malformed.

    Rare events are returned as they are.
    """
    try:
        event = json.loads(line)
        if event["event"] in RARE_EVENTS:
            return dict(event)
        fields = EVENT_FIELDS[event["event"]]
        event = {"event": event["event"], **{name: event.get(name) for name in fields}}
        for name in {"epoch", "val_tokens"}.intersection(fields):  # older versions lack them
            event[name] = event[name] or 0
    except Exception:
        # A crash may leave part of a line; a file from elsewhere may hold anything.
        return {}
    numbers = [event[name] for name in fields if event[name] is not None]
    is_complete = event.get("val_loss") is None or None not in event.values()
    is_valid = is_count(event["step"]) and all(map(is_finite_number, numbers))
    return event if is_valid and is_complete else {}


def thin_out(items: list[T], limit: int) -> list[T]:
    """At most `limit` of the items, evenly spaced, with the last one."""
    stride = max(1, -(-len(items) // limit))
    return items[(len(items) - 1) % stride :: stride]


def series(events: Iterable[Event], name: str) -> list[float]:
    """One field of all events; NaN, a gap in a curve, where it is missing or null."""
    values = (event.get(name) for event in events)
    return [float("nan") if value is None else float(value) for value in values]


def step_line(event: Event) -> str:
    """A train event as a line of the log."""
    return (
        f"step {event['step']} | loss: {event['loss']:.4f} | dt: {event['dt_ms']:.2f}ms"
        f" | tok/sec: {event['tok_per_sec']:.2f} | norm: {event['norm']:.2f}"
        f" | lr: {event['lr']:.6f}"
    )
