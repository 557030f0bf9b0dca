"""One run folder: what is in it, and what is wrong with it. Used by harness.py and faults.py."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptforge.checkpoint.store import CheckpointStore, find_corruption

STEPS, SAVE_EVERY, EVAL_EVERY, KEEP = 30, 5, 7, 2
OUT_DIR = "disk/run"
COMPARED = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


@dataclass(frozen=True)
class Complaint:
    """A promise that was broken: the kind is lost, differs or rough."""

    kind: str
    what: str


@dataclass(frozen=True)
class Ended:
    """How one process ended, and what it said."""

    code: int
    """A shell's number: 128 and the signal, where a signal ended it."""
    out: str
    err: str


@dataclass
class Case:
    """One run folder and what is to be said about it. Files of its own lie in `folder`."""

    folder: Path
    complaints: list[Complaint] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        """What a fault may mount a file system over; nothing but the run lies there."""
        return self.folder / "disk"

    @property
    def run(self) -> Path:
        return self.folder / OUT_DIR

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run / "checkpoints")

    def newest(self) -> int:
        """Steps in the newest whole checkpoint; 0 if there is none. Changes nothing."""
        whole = [path for path in self.store.checkpoints() if find_corruption(path) is None]
        return int(whole[-1].name.removeprefix("step-")) if whole else 0

    def complain(self, kind: str, what: str) -> None:
        self.complaints.append(Complaint(kind, what))


def log_faults(path: Path, *, torn_end_is_fine: bool = False) -> list[str]:
    """What is wrong with a finished run's metrics: each step once, in order, all numbers finite."""
    found = []
    events: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    end = lines.pop()  # what stands behind the last line's end: nothing, or half a line
    if end and not torn_end_is_fine:
        found.append(f"metrics.jsonl ends in half a line: {end!r}")
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            found.append(f"metrics.jsonl line {number} is no JSON: {line[:60]!r}")
    steps = [event["step"] for event in events if event["event"] == "train"]
    if steps != list(range(STEPS)):
        found.append(f"metrics.jsonl has the train steps {steps}")
    for event in events:
        bad = [n for n, v in event.items() if v is None or v != v or v in (math.inf, -math.inf)]
        if bad:
            found.append(f"metrics.jsonl: {event['event']} has no finite {', '.join(bad)}")
    return found


def one_error_line(case: Case, ended: Ended, *codes: int) -> None:
    """Complain unless the program left with one of these codes and one line that says why."""
    if not ended.code and case.newest() == STEPS:
        return  # nothing is left to be refused
    lines = ended.err.strip().splitlines()
    if ended.code not in codes:
        case.complain("rough", f"exit {ended.code}: {ended.err.strip()[-300:]}")
    elif "Traceback" not in ended.err and not (len(lines) == 1 and lines[0][:7] == "error: "):
        case.complain("rough", f"not one line of error: {ended.err[-300:]!r}")


def culprit(err: str) -> str:
    """A traceback's last words, and the last line of the program that it names."""
    frames = [line.strip() for line in err.splitlines() if "/gptforge/" in line]
    where = frames[-1].rpartition("/gptforge/")[2] if frames else "?"
    return f"{err.strip().splitlines()[-1]} at {where}"


def announced(run: Path) -> int:
    """The newest checkpoint that the metrics call saved."""
    path = run / "metrics.jsonl"
    newest = 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "save":
            newest = max(newest, event["step"])
    return newest


def hashes_of(case: Case) -> dict[str, str]:
    """SHA-256 of what the last checkpoint has learned; nothing if there is none."""
    last = case.store.read_link("last")
    if last is None:
        return {}
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in COMPARED}


def pointers_of(case: Case) -> dict[str, str | None]:
    """Names that best and last lead to."""
    found = {which: case.store.read_link(which) for which in ("best", "last")}
    return {which: path.name if path else None for which, path in found.items()}


def evaluations_of(case: Case) -> list[object]:
    """Step, loss and bits per byte of each evaluation, then the samples."""
    lines = (case.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if '"event": "eval"' in line]
    found: list[object] = [[e[name] for name in ("step", "val_loss", "val_bpb")] for e in events]
    return [*found, (case.run / "samples.md").read_text(encoding="utf-8")]
