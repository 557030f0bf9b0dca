"""The files of a run folder, and checks of `--out_dir` before anything is written there."""

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from gptforge import files
from gptforge.checkpoint.format import CONFIG
from gptforge.config import Config
from gptforge.errors import UserError
from gptforge.lock import LOCK_FILE, is_locked
from gptforge.patterns import is_inside
from gptforge.shell import quote

TEACHERS = "teachers"  # folder of a run's teachers, which are runs of their own
TRACKING = "tracking"  # folder of the files of experiment trackers
LOG, METRICS, SAMPLES = "log.md", "metrics.jsonl", "samples.md"
CURVES, REPORT = "training_curves.png", "report.html"
RUN_FOLDERS = {"checkpoints", TEACHERS, TRACKING}
RUN_FILES = RUN_FOLDERS | {CONFIG, LOG, METRICS, SAMPLES, CURVES, REPORT}
"""What a run leaves in its folder."""
MAX_METRICS_BYTES, MAX_LINE_BYTES = 2**28, 2**16
"""How much of the end of the metrics is read, more than a million lines, and of a line at once."""


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
        fix = "change its permissions, or choose another"
        raise UserError(f"--out_dir {folder}: {existing} cannot be written to: {fix}")


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
    if config.restart and has_files(folder):
        if problem := _why_not_movable(folder):
            raise UserError(f"--out_dir {folder} cannot be moved to a backup: {problem}")
        if inputs:
            raise UserError(
                f"--restart would move {folder} to a backup with {inputs} in it: choose another "
                "--out_dir, or put that elsewhere first"
            )
    elif not (folder / CONFIG).is_file() and has_files(folder, ignore=RUN_FILES):
        hint = "choose another, or give --restart to move it to a backup"
        if inputs:
            hint = f"choose another, as {inputs} lies there"
        raise UserError(f"--out_dir {folder} holds other files and no run: {hint}")


def is_finished_read_only(folder: Path) -> bool:
    """Whether a finished run lies in a folder that cannot be written to."""
    return (
        (folder / CONFIG).is_file()
        and not os.access(folder, os.W_OK)
        and has_line(folder / METRICS, '"event": "end"')
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


def has_files(folder: Path, *, ignore: Collection[str] = ()) -> bool:
    """Whether a folder holds files that are not hidden, as those that a crash may leave are."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(not name.startswith(".") for name in names.difference(ignore))


def has_line(metrics: Path, text: str) -> bool:
    """Whether a line of a run's metrics, complete with its end, contains a text."""
    lines = read_metrics_lines(metrics)
    return any(text.encode() in line and line.endswith(b"\n") for line in lines)


def read_metrics_lines(metrics: Path) -> Iterator[bytes]:
    """The lines of a run's metrics; none if the file is missing or not regular."""
    with suppress(OSError), files.open_regular(metrics, follow_symlinks=False) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_METRICS_BYTES))
        yield from iter(lambda: file.readline(MAX_LINE_BYTES), b"")
