"""What a run folder says about its run: configuration, state, outcome and versions."""

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptforge import files
from gptforge.checkpoint.format import (
    CONFIG,
    MODEL,
    TOKENIZER,
    list_checkpoints,
    read_config,
    read_link,
    read_state,
)
from gptforge.checkpoint.out_dir import METRICS
from gptforge.config import Config
from gptforge.config_file import read_toml
from gptforge.errors import UserError, explain_os_errors
from gptforge.files import is_finite_number
from gptforge.lock import is_locked
from gptforge.report.metrics import History, read_history

MAX_DEPTH = 3  # levels of folders that are searched for runs
STATES = {"finished": "complete", "early_stop": "complete", "time_limit": "time limit"}
"""Reason in the end event -> state; other reasons are "stopped"."""
SWEEP_DATA = "sweep-data"
"""Folder beside the trials of a sweep, with the text that they read; locked while it runs."""
NO_FACTS = frozenset({"event", "time", "command", "step", "max_steps", "checkpoint"})
"""Fields of start and resume events that describe neither machine nor program."""
RATE_TOLERANCE = 1e-6
"""Relative difference of learning rates that are the same: of the rounding of a cosine."""
COMPLETE = frozenset(STATES.values())
SAMPLE_HEADING = re.compile(r"^## After (\d{1,18}) steps\n\n(~{3,})text\n", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class RunInfo:
    """A run on disk; see `read_run`."""

    path: Path
    config: Config  # resolved
    made_by: Mapping[str, str]  # versions and command of the last start
    history: History
    saved: Mapping[str, Any]  # state.json of the last checkpoint; empty if missing or damaged
    tokenizer: str  # text of that checkpoint's tokenizer.json, else its name
    state: str  # complete, time limit, stopped, running, or unfinished (no end event)

    @property
    def text(self) -> str:
        """Name of the text."""
        name = self.config.input.removeprefix("bundled:")
        return Path(name).name or name

    def has_same_text(self, other: "RunInfo") -> bool:
        """Whether both were trained and evaluated on the same text: by hashes, else by its path."""
        saved, other_saved = self.saved, other.saved
        if not (saved and other_saved):
            return self.config.input == other.config.input
        # The hash of the text depends on the tokenizer if there are several files.
        names = [name for name in ("inputs", "val_inputs") if name in saved and name in other_saved]
        is_same = "inputs" in names and all(saved[name] == other_saved[name] for name in names)
        return is_same or saved.get("text_sha256", "") == other_saved.get("text_sha256")

    def has_same_schedule(self, other: "RunInfo") -> bool:
        """Whether two runs of one configuration had the same learning rates, as far as they logged
        the same steps, and the same dropout.

        They differ if one was extended: it followed the schedule of fewer steps before.
        """
        rates, other_rates = (
            {event["step"]: event["lr"] for event in run.history.train if event["lr"] is not None}
            for run in (self, other)
        )
        is_same = all(
            math.isclose(rates[step], other_rates[step], rel_tol=RATE_TOLERANCE)
            for step in rates.keys() & other_rates
        )
        if not self.config.dropout or not self.config.dropout_ramp:
            return is_same
        return is_same and self._extensions == other._extensions

    @property
    def _extensions(self) -> list[tuple[Any, Any]]:
        """Where the run was resumed with more steps: the step, and the steps that it had before.

        Earlier versions did not log that.
        """
        starts = [event for event in self.history.rare if "max_steps" in event]
        return [
            (event.get("step"), before["max_steps"])
            for before, event in itertools.pairwise(starts)
            if before["max_steps"] != event["max_steps"]
        ]

    @property
    def subset_tokens(self) -> int:
        """Held-out tokens that the loss of `best` is over; 0 if these are all of them."""
        tokens, c = int((self.history.best or {}).get("val_tokens", 0)), self.config
        is_part = 0 < c.eval_tokens <= tokens  # fewer are all that is held out
        return tokens if is_part and not self.history.final else 0

    @property
    def seconds(self) -> float | None:
        """Wall time of training: at the end, else at the last checkpoint."""
        progress = self.saved.get("progress", {})
        for seconds in (self.history.end.get("seconds"), progress.get("seconds")):
            if seconds is not None and is_finite_number(seconds):
                return float(seconds)
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """Device, precision and versions of the last start; the first one's where unknown."""
        found: dict[str, Any] = {}
        for event in self.history.rare:
            if event["event"] in ("start", "resume"):
                found |= event
        found |= self.made_by
        return {name: value for name, value in found.items() if name not in NO_FACTS}

    @property
    def modified(self) -> float:
        """When the run was last written to, in seconds since 1970."""
        path = self.path / METRICS
        return (path if path.is_file() else self.path / CONFIG).stat().st_mtime

    def to_json(self) -> dict[str, Any]:
        """The facts that `gptforge runs` and `compare` print."""
        best = self.history.best or {}
        return {
            "run": self.path.as_posix(),
            "state": self.state,
            "reason": self.history.end.get("reason"),
            "text": self.text,
            "val_loss": best.get("val_loss"),
            "val_bpb": best.get("val_bpb"),
            "val_tokens": best.get("val_tokens") or None,
            "is_val_subset": self.subset_tokens > 0,
            "best_step": best.get("step"),
            "step": self.history.steps,
            "max_steps": self.config.max_steps,
            "tokens": self.history.steps * self.config.tokens_per_step,
            "seconds": self.seconds,
            "tok_per_sec": self.history.tok_per_sec,
            "seed": self.config.seed,
            "modified": self.modified,
        }


def read_run(path: Path, *, pending: str = "") -> RunInfo:
    """Read a run, finished or in progress, of this or an earlier version.

    `pending` are lines that are not in metrics.jsonl yet.

    Raises:
        UserError: if there is no run, or its config.toml is damaged.
    """
    check_run_dir(path)
    config = read_config(path, with_model=False)
    _, made_by = read_toml(path / CONFIG)
    if made_by is None:
        raise UserError(f"{path.as_posix()} is not a run folder: its {CONFIG} is not from training")
    history = read_history(path / METRICS, pending=pending)
    if history.end:
        state = STATES.get(history.end["reason"], "stopped")
    else:
        state = "running" if is_locked(path) else "unfinished"
    saved, tokenizer = _read_checkpoint(path / "checkpoints")
    return RunInfo(path, config, made_by, history, saved, tokenizer or config.tokenizer, state)


@explain_os_errors()
def check_run_dir(path: Path) -> None:
    """Raise a UserError unless a folder has the configuration of a run, and is no checkpoint."""
    if not (path / CONFIG).is_file():
        problem = f"is not a run folder, it has no {CONFIG}" if path.exists() else "does not exist"
        raise UserError(f"{path.as_posix()} {problem}: give the out_dir of a run")
    if (path / MODEL).exists():
        raise UserError(f"{path.as_posix()} is a model: give its run folder")


def find_runs(folder: Path, depth: int = MAX_DEPTH) -> list[Path]:
    """A folder if it has files of a run, else those below it that do."""
    if any((folder / name).exists() for name in (CONFIG, METRICS, "checkpoints")):
        return [folder]
    inner = subfolders(folder) if depth else []
    return [run for sub in inner for run in find_runs(sub, depth - 1)]


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden; none if it cannot be read."""
    try:
        found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError:
        return []
    return sorted(found)


def disk_bytes(folder: Path) -> int:
    """Size of all files in a folder; links are not followed, and vanished files do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_dir() else path.lstat().st_size
        except OSError:
            continue
    return total


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Steps and generated texts of samples.md; none if the file is missing or no text."""
    try:
        text = files.read_text(path, follow_symlinks=False)
    except (OSError, UnicodeDecodeError):
        return []
    samples, end = [], 0
    while heading := SAMPLE_HEADING.search(text, end):
        end = text.find(f"\n{heading[2]}\n", heading.end())
        if end == -1:
            break  # a crash may leave a part of the last one
        samples.append((int(heading[1]), text[heading.end() : end].strip("\n")))
    return samples


def _read_checkpoint(folder: Path) -> tuple[Mapping[str, Any], str]:
    """State and tokenizer of the last checkpoint."""
    path = read_link(folder / "last") or next(iter(list_checkpoints(folder)[-1:]), folder)
    try:
        tokenizer = json.dumps(json.loads(files.read_text(path / TOKENIZER, follow_symlinks=False)))
        return read_state(path), tokenizer
    except (UserError, OSError, ValueError, RecursionError):
        return {}, ""
