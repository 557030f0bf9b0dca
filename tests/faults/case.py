"""A run folder under test: its contents, and what is wrong with it."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptforge.checkpoint.format import find_corruption
from gptforge.checkpoint.store import CheckpointStore

STEPS, SAVE_EVERY, EVAL_EVERY, KEEP = 30, 5, 7, 2
OUT_DIR = "disk/run"
COMPARED = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


@dataclass(frozen=True)
class Violation:
    """A broken promise; `kind` is lost, differs or rough."""

    kind: str
    what: str


@dataclass(frozen=True)
class ProcessResult:
    """Exit code and output of a process."""

    code: int
    """As a shell has it: 128 plus the signal that ended it."""
    out: str
    err: str


@dataclass
class Case:
    """A run folder and its violations."""

    folder: Path
    violations: list[Violation] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        """Where a fault may mount a file system; it holds only the run."""
        return self.folder / "disk"

    @property
    def run(self) -> Path:
        return self.folder / OUT_DIR

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.run / "checkpoints")

    def latest_step(self) -> int:
        """Step of the latest intact checkpoint; 0 if there is none. Changes nothing."""
        intact = [path for path in self.store.checkpoints() if find_corruption(path) is None]
        return int(intact[-1].name.removeprefix("step-")) if intact else 0

    def report(self, kind: str, what: str) -> None:
        self.violations.append(Violation(kind, what))


def log_problems(path: Path) -> list[str]:
    """Problems of a finished run's metrics: each step once, in order, all numbers finite."""
    found = []
    events: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    end = lines.pop()  # after the last newline: nothing, or half a line
    if end:
        found.append(f"metrics.jsonl ends in half a line: {end!r}")
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            found.append(f"metrics.jsonl line {number} is not JSON: {line[:60]!r}")
    steps = [event["step"] for event in events if event["event"] == "train"]
    if steps != list(range(STEPS)):
        found.append(f"metrics.jsonl has the train steps {steps}")
    for event in events:
        bad = [n for n, v in event.items() if v is None or v != v or v in (math.inf, -math.inf)]
        if bad:
            found.append(f"metrics.jsonl: {event['event']} has no finite {', '.join(bad)}")
    return found


def expect_one_error_line(case: Case, result: ProcessResult, *codes: int) -> None:
    """Report a violation unless the program exited with one of the codes and one line of error."""
    if not result.code and case.latest_step() == STEPS:
        return  # nothing was left to do
    lines = result.err.strip().splitlines()
    if result.code not in codes:
        case.report("rough", f"exit {result.code}: {result.err.strip()[-300:]}")
    elif "Traceback" not in result.err and not (len(lines) == 1 and lines[0][:7] == "error: "):
        case.report("rough", f"not one line of error: {result.err[-300:]!r}")


def traceback_origin(err: str) -> str:
    """The error of a traceback and the last line of this package in it."""
    frames = [line.strip() for line in err.splitlines() if "/gptforge/" in line]
    where = frames[-1].rpartition("/gptforge/")[2] if frames else "?"
    return f"{err.strip().splitlines()[-1]} at {where}"


def latest_announced_save(run: Path) -> int:
    """Step of the latest save event in the metrics."""
    path = run / "metrics.jsonl"
    latest = 0
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "save":
            latest = max(latest, event["step"])
    return latest


def hashes_of(case: Case) -> dict[str, str]:
    """SHA-256 of the tensor files of the last checkpoint."""
    last = case.store.read_link("last")
    if last is None:
        return {}
    return {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in COMPARED}


def links_of(case: Case) -> dict[str, str | None]:
    """Checkpoints that best and last point to."""
    found = {which: case.store.read_link(which) for which in ("best", "last")}
    return {which: path.name if path else None for which, path in found.items()}


def evaluations_of(case: Case) -> list[object]:
    """Step, loss and bits per byte of each evaluation, then the samples."""
    lines = (case.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if '"event": "eval"' in line]
    found: list[object] = [[e[name] for name in ("step", "val_loss", "val_bpb")] for e in events]
    return [*found, (case.run / "samples.md").read_text(encoding="utf-8")]
