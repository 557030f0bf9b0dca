"""Opens a run folder: for a new run, to resume one, or to find it finished."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from gptforge import files
from gptforge.checkpoint.extension import extend_run
from gptforge.checkpoint.format import CONFIG, read_config, read_state, read_tokenizer
from gptforge.checkpoint.store import CheckpointStore
from gptforge.config import Config, resume_conflicts
from gptforge.config_file import read_toml
from gptforge.errors import UserError
from gptforge.lock import LOCK_FILE, FolderLock, is_locked, lock_folder
from gptforge.patterns import is_inside
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

TEACHERS = "teachers"
"""Folder of a run's teachers, which are runs of their own."""
TRACKING = "tracking"
"""Folder of the files of experiment trackers."""
RUN_FOLDERS = {"checkpoints", TEACHERS, TRACKING}
RUN_FILES = RUN_FOLDERS | {
    *(CONFIG, "log.md", "metrics.jsonl", "samples.md", "training_curves.png", "report.html")
}
"""What a run leaves in its folder."""
MAX_METRICS_BYTES, MAX_LINE_BYTES = 2**28, 2**16
"""How much of the end of the metrics is read, more than a million lines, and of a line at once."""


@dataclass(frozen=True)
class OpenedRun:
    """What a run folder holds, and how to start from it."""

    status: Literal["new", "resume", "finished"]
    config: Config
    """The requested configuration, adapted to a run that resumes."""
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    counters: dict[str, Any] = field(default_factory=dict)
    """Fields of `TrainState` that replace those of the checkpoint."""
    drops_decay: bool = False
    """Whether to resume from before the decay, and drop the checkpoints after it."""
    moves_old_run: bool = False
    """Whether an old run has to be moved to a backup before this one starts."""

    def to_json(self) -> dict[str, Any]:
        """For ranks that cannot look themselves: the folder may be on another machine."""
        path = self.checkpoint and self.checkpoint.as_posix()
        return vars(self) | {"config": vars(self.config), "checkpoint": path}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "OpenedRun":
        """Inverse of `to_json`."""
        path, notices = record["checkpoint"], tuple(record["notices"])
        fields = {"config": Config(**record["config"]), "notices": notices}
        return cls(**{**record, **fields, "checkpoint": path and Path(path)})


def lock_run_dir(folder: Path) -> FolderLock:
    """Lock a run folder; a UserError if another process trains into it."""
    if lock := lock_folder(folder):
        return lock
    raise UserError(
        f"{folder.as_posix()} is being trained by another process: wait for it, or choose another "
        "--out_dir"
    )


def open_run(
    config: Config, *, explicit: Collection[str], tokenizer: Tokenizer, text_sha256: str
) -> OpenedRun:
    """Decide between a new run, resuming and a finished run; repairs but never deletes.

    Args:
        config: resolved, with out_dir; `explicit` are the fields that the user set.
        tokenizer: of this run.
        text_sha256: hash of the training text.

    Raises:
        UserError: if the folder holds something else, or a run with another configuration.
    """
    check_out_dir(config)
    folder = Path(config.out_dir)
    if config.restart and _has_files(folder):
        return OpenedRun("new", config, moves_old_run=True)
    store, metrics = CheckpointStore(folder / "checkpoints"), folder / "metrics.jsonl"
    latest, notices = store.latest()
    if latest is None:
        if any(store.folder.glob("step-*")) or _has_event("save", metrics):
            problems = f"{'; '.join(notices)}; " if notices else ""
            raise UserError(
                f"{problems}{folder.as_posix()} holds a run without an intact checkpoint: put one "
                "back, or start from scratch with --restart"
            )
        # It ended before its first save: start from scratch in place.
        return OpenedRun("new", config)
    old, state = read_config(latest), read_state(latest)
    store.repair_links(latest)
    known_best: dict[str, Any] = {}
    if renamed := store.renamed_best(latest):
        best = read_state(renamed)["progress"]
        known_best = {name: best[name] for name in ("best_loss", "best_step")}
    requested_steps = config.max_steps
    config = resume_config(
        latest, config, explicit=explicit, tokenizer=tokenizer, text_sha256=text_sha256
    )
    if requested_steps < config.max_steps:
        notices.append(
            f"--max_steps {requested_steps} is less than the {config.max_steps} that this run has "
            f"by now: it keeps {config.max_steps}"
        )
    progress = state["progress"]
    if config.max_steps > old.max_steps:
        check_writable(folder)
        checkpoint, counters, notice = extend_run(store, latest, config)
        return OpenedRun(
            "resume", config, checkpoint, read_state(checkpoint), (*notices, notice),
            counters=counters | known_best, drops_decay=checkpoint != latest,
        )  # fmt: skip
    is_pending = progress.get("unjudged") or state.get("pending")
    is_done = progress["step"] >= config.max_steps or _stopped_early(config, progress)
    # A signal may have stopped the final evaluation of a run with all its steps.
    has_ended = _has_line(metrics, '"reason": "finished"') or _is_early_stop(metrics)
    if is_done and not is_pending and has_ended:
        return OpenedRun("finished", config, latest, state, tuple(notices))
    check_writable(folder)
    return OpenedRun("resume", config, latest, state, tuple(notices), counters=known_best)


def _stopped_early(config: Config, progress: Mapping[str, Any]) -> bool:
    """Whether a run ended by early stopping, unless a higher patience lets it train on."""
    since_best = progress.get("evals_since_best", 0)
    is_final = config.patience < 0 or 0 < config.patience <= since_best
    return is_final and _is_early_stop(Path(config.out_dir) / "metrics.jsonl")


def _is_early_stop(metrics: Path) -> bool:
    return _has_line(metrics, '"reason": "early_stop"')


def resume_config(
    checkpoint: Path,
    config: Config,
    *,
    explicit: Collection[str],
    tokenizer: Tokenizer,
    text_sha256: str,
) -> Config:
    """The configuration with which `config` resumes the run of a checkpoint; changes no file.

    A run whose max_steps was raised keeps them, so the command that started it still works.

    Raises:
        UserError: saying what differs in the run: configuration, tokenizer or text.
    """
    old, folder = read_config(checkpoint), Path(config.out_dir)
    for name in {"warmup_steps", "patience"}.difference(explicit):
        config = dataclasses.replace(config, **{name: getattr(old, name)})
    # A tokenizer is compared by content, not by path.
    max_steps = max(config.max_steps, old.max_steps)
    config = dataclasses.replace(config, tokenizer=old.tokenizer, max_steps=max_steps)
    conflicts = resume_conflicts(old, config)
    if read_tokenizer(checkpoint).to_json() != tokenizer.to_json():
        conflicts.append("tokenizer: not the one that the run was started with")
    if read_state(checkpoint)["text_sha256"] != text_sha256:
        conflicts.append(f"input: not the text that {folder.as_posix()} was trained on")
    if conflicts:
        raise UserError(
            f"{folder.as_posix()} holds a run with another configuration "
            f"({'; '.join(conflicts)}): choose another --out_dir, or --restart to move it to a "
            "backup"
        )
    return config


def is_run_of(folder: Path, preset: str, text: str) -> bool:
    """Whether a folder has a run with this preset and this `--input`."""
    try:
        values, _ = read_toml(folder / CONFIG)
    except UserError:
        return False
    is_same_text = files.real_path(str(values.get("input"))) == files.real_path(text)
    return is_same_text and values.get("preset") == preset


def check_writable(folder: Path) -> None:
    """Raise a UserError if the folder cannot be created or written to; changes no file."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        if existing.is_symlink():
            raise UserError(f"--out_dir {folder}: {existing} is a dangling link")
        existing = existing.parent
    if not existing.is_dir():
        problem = "is a file" if existing == folder else f"cannot be created: {existing} is a file"
        raise UserError(f"--out_dir {folder} {problem}: choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {folder}: {existing} cannot be written to: choose another")


def check_out_dir(config: Config) -> None:
    """Raise a UserError if out_dir cannot be used or holds no run; changes no file."""
    folder = Path(config.out_dir)
    real = files.real_path(folder)
    for parent in (real, *real.parents):
        if parent.name == "checkpoints" and (parent.parent / CONFIG).is_file():
            raise UserError(
                f"--out_dir {folder} lies among the checkpoints of a run: choose another, or "
                f"resume that run with --out_dir {quote(parent.parent.as_posix())}"
            )
    if is_finished_read_only(folder) and not config.restart:
        return
    check_writable(folder)
    if not config.restart:
        _refuse_links(folder)
    if (folder / "checkpoints").is_dir():
        check_writable(folder / "checkpoints")
    outside = list(real.parents)
    if real.parent.name == TEACHERS:
        # A teacher lies in the run of its student, which is locked meanwhile.
        outside.remove(real.parent.parent)
    if outer := next(filter(is_locked, outside), None):
        raise UserError(
            f"--out_dir {folder} lies in {outer}, which another process trains into: choose another"
        )
    inputs = _inputs_inside(config, folder)
    if config.restart and _has_files(folder):
        if problem := _why_not_movable(folder):
            raise UserError(f"--out_dir {folder} cannot be moved to a backup: {problem}")
        if inputs:
            raise UserError(
                f"--restart would move {folder} to a backup with {inputs} in it: choose another "
                "--out_dir, or put that elsewhere first"
            )
    elif not (folder / CONFIG).is_file() and _has_files(folder, ignore=RUN_FILES):
        hint = "choose another, or give --restart to move it to a backup"
        if inputs:
            hint = f"choose another, as {inputs} lies there"
        raise UserError(f"--out_dir {folder} holds other files and no run: {hint}")


def is_finished_read_only(folder: Path) -> bool:
    """Whether a finished run lies in a folder that cannot be written to."""
    return (
        (folder / CONFIG).is_file()
        and not os.access(folder, os.W_OK)
        and _has_event("end", folder / "metrics.jsonl")
    )


def _refuse_links(folder: Path) -> None:
    """Raise a UserError for links among a run's files: a run from elsewhere may hold any."""
    for name in sorted(RUN_FILES):
        path = folder / name
        kind = files.nonregular_kind(path, follow_symlinks=False)
        if name in RUN_FOLDERS and path.is_symlink():
            raise UserError(
                f"--out_dir {folder}: {path} is a link to {path.readlink()}, and a run saves only "
                "into its own folder: move the whole run there and give --out_dir that folder, or "
                "a link to it"
            )
        if kind and not (name in RUN_FOLDERS and path.is_dir()):
            raise UserError(
                f"--out_dir {folder}: {path} is {kind}, which is neither read nor written through: "
                "remove it, or choose another --out_dir"
            )


def _why_not_movable(folder: Path) -> str:
    """Why a folder must not be renamed; else an empty string."""
    if files.real_path(folder) in (Path.cwd(), *Path.cwd().parents):
        return "it is or contains the working directory"
    if os.path.ismount(folder):
        return "something is mounted there; choose a folder inside it"
    parent = folder.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{files.real_path(parent)} cannot be written to"
    # A run inside it may belong to somebody else or be training right now.
    for depth in ("*", "*/*"):
        locked = filter(is_locked, (lock.parent for lock in folder.glob(f"{depth}/{LOCK_FILE}")))
        saved = (path.parents[1] for path in folder.glob(f"{depth}/checkpoints/step-*"))
        others = (run for run in saved if run.parent != folder / TEACHERS)
        if inner := next(chain(locked, others), None):
            return f"it holds the run {inner.name}; choose that, or another"
    return ""


def _inputs_inside(config: Config, folder: Path) -> str:
    """The flags, with values, that name files inside a run folder; else an empty string.

    `--init_from` may: its weights and tokenizer are read before the folder is moved, and saved
    with the new run.
    """
    paths = {"input": config.input}
    starts_inside = config.init_from and is_inside(folder, config.init_from)
    if Path(config.tokenizer).is_file() and not starts_inside:
        paths["tokenizer"] = config.tokenizer
    return " and ".join(
        f"--{flag} {path}" for flag, path in paths.items() if path and is_inside(folder, path)
    )


def _has_event(event: str, metrics: Path) -> bool:
    """Whether a run's metrics hold such an event."""
    return _has_line(metrics, f'"event": "{event}"')


def _has_line(metrics: Path, text: str) -> bool:
    """Whether a line of a run's metrics contains a text."""
    return any(text.encode() in line for line in read_metrics_lines(metrics))


def read_metrics_lines(metrics: Path) -> Iterator[bytes]:
    """The lines of a run's metrics; none if the file is missing or not regular."""
    with suppress(OSError), files.open_regular(metrics, follow_symlinks=False) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_METRICS_BYTES))
        yield from iter(lambda: file.readline(MAX_LINE_BYTES), b"")


def _has_files(folder: Path, *, ignore: Collection[str] = ()) -> bool:
    """Whether a folder holds files that are not hidden: a crash may leave hidden ones of ours."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(not name.startswith(".") for name in names.difference(ignore))
