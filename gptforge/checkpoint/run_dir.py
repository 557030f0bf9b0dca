"""Opening a run folder: a new run, one to go on with, or one that is finished."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from gptforge import files
from gptforge.checkpoint.store import (
    CONFIG,
    CheckpointStore,
    read_config,
    read_state,
    read_tokenizer,
)
from gptforge.config import Config, resume_conflicts
from gptforge.errors import UserError
from gptforge.lock import LOCK_FILE, FolderLock, is_locked, lock_folder
from gptforge.shell import quote
from gptforge.tokenizers import Tokenizer

RUN_FILES = {CONFIG, "log.md", "metrics.jsonl", "samples.md", "training_curves.png", "checkpoints"}
"""What a run leaves in its folder."""
MAX_SCAN_BYTES, MAX_LINE_BYTES = 2**28, 2**16
"""Of metrics that are looked through, from the end, and of one line of them."""


@dataclass(frozen=True)
class OpenedRun:
    """What was found in a run folder."""

    status: Literal["new", "resume", "finished"]
    config: Config
    """As asked, in step with what the folder holds."""
    checkpoint: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    moves_old_run: bool = False
    """Whether an old run is to be moved aside before this one begins."""

    def to_json(self) -> dict[str, Any]:
        """For the ranks that cannot look for themselves: the folder may be on another machine."""
        path = None if self.checkpoint is None else self.checkpoint.as_posix()
        return vars(self) | {"config": vars(self.config), "checkpoint": path}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "OpenedRun":
        """Read what `to_json` wrote."""
        path = record["checkpoint"]
        own = {"config": Config(**record["config"]), "checkpoint": path and Path(path)}
        return cls(**{**record, **own, "notices": tuple(record["notices"])})


def open_run(
    config: Config, *, explicit: Collection[str], tokenizer: Tokenizer, text_sha256: str
) -> OpenedRun:
    """Look into `config.out_dir` and decide. What is there is only set right, never thrown away.

    Args:
        config: settled, with out_dir.
        given: fields that the user set by hand.
        tokenizer: of this run.
        text_sha256: of the text this run would learn.

    Raises:
        UserError: if the folder holds something else, or a run with another configuration.
    """
    check_out_dir(config)
    folder = Path(config.out_dir)
    if config.restart and _holds_something(folder):
        return OpenedRun("new", config, moves_old_run=True)
    store = CheckpointStore(folder / "checkpoints")
    newest, warnings = store.latest()
    if newest is None:
        if store.has_history() or _tells_of("save", folder / "metrics.jsonl"):
            said = f"{'; '.join(warnings)}; " if warnings else ""
            raise UserError(
                f"{said}{folder.as_posix()} holds a run without a whole checkpoint: put one back, "
                "or start anew with --overwrite"
            )
        # Nothing was learned yet: it starts over in place.
        return OpenedRun("new", config)
    old, state = read_config(newest), read_state(newest)
    store.repair_links(newest)
    config = resume_config(
        newest, config, explicit=explicit, tokenizer=tokenizer, text_sha256=text_sha256
    )
    if config.max_steps > old.max_steps:
        warnings.append(
            f"--max_steps raised from {old.max_steps} to {config.max_steps}: "
            "the learning rate follows the new schedule from here"
        )
    progress = state["progress"]
    is_pending = progress.get("unjudged") or state.get("pending")
    is_finished = progress["step"] >= config.max_steps and not is_pending
    is_finished &= _tells_of("end", folder / "metrics.jsonl")
    status: Literal["resume", "finished"] = "finished" if is_finished else "resume"
    if status == "resume":
        check_writable(folder)
    return OpenedRun(status, config, newest, state, tuple(warnings))


def resume_config(
    checkpoint: Path,
    config: Config,
    *,
    explicit: Collection[str],
    tokenizer: Tokenizer,
    text_sha256: str,
) -> Config:
    """`config` as it goes on with the run that a checkpoint is of; only looks.

    Raises:
        UserError: if the run was begun with another configuration, tokenizer or text.
    """
    old, folder = read_config(checkpoint), Path(config.out_dir)
    if "warmup_steps" not in explicit:
        config = dataclasses.replace(config, warmup_steps=old.warmup_steps)
    # Where a tokenizer lies is of no matter; what it says is.
    config = dataclasses.replace(config, tokenizer=old.tokenizer)
    found = resume_conflicts(old, config)
    if read_tokenizer(checkpoint).to_json() != tokenizer.to_json():
        found.append("tokenizer: not the one that the run was begun with")
    if read_state(checkpoint)["text_sha256"] != text_sha256:
        found.append(f"input: the text is not the one that {folder.as_posix()} learned")
    if found:
        is_longer = len(found) == 1 and config.max_steps < old.max_steps
        go_on = f"go on with --max_steps {old.max_steps}, " if is_longer else ""
        raise UserError(
            f"{folder.as_posix()} holds a run with another configuration ({'; '.join(found)}): "
            f"{go_on}choose another --out_dir, or --overwrite to move it aside"
        )
    return config


def check_writable(folder: Path) -> None:
    """Raise a UserError if no folder can be made there; only looks."""
    place = folder
    while not place.exists() and place != place.parent:
        if place.is_symlink():
            raise UserError(f"--out_dir {folder}: {place} is a link that leads nowhere")
        place = place.parent
    if not place.is_dir():
        where = f"{folder} is" if place == folder else f"{folder} cannot be: {place} is"
        raise UserError(f"--out_dir {where} a file: choose another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"--out_dir {folder}: {place} cannot be written to: choose another")


def check_out_dir(config: Config) -> None:
    """Raise a UserError if `config.out_dir` cannot be or holds what is no run; only looks."""
    folder = Path(config.out_dir)
    place = files.real_path(folder)
    for above in (place, *place.parents):
        if above.name == "checkpoints" and (above.parent / CONFIG).is_file():
            raise UserError(
                f"--out_dir {folder} lies among the checkpoints of a run: choose another, or go on "
                f"with that run by --out_dir {quote(above.parent.as_posix())}"
            )
    if is_finished_read_only(folder) and not config.restart:
        return
    check_writable(folder)
    if not config.restart:
        _refuse_links(folder)
    if (folder / "checkpoints").is_dir():
        check_writable(folder / "checkpoints")
    if outer := next(filter(is_locked, files.real_path(folder).parents), None):
        raise UserError(
            f"--out_dir {folder} lies in {outer}, which another process trains into: choose another"
        )
    needed = _needed_inside(config, folder)
    if config.restart and _holds_something(folder):
        if reason := _why_not_aside(folder):
            raise UserError(f"--out_dir {folder} cannot be moved aside: {reason}")
        if needed:
            raise UserError(
                f"--overwrite would move {folder} aside with {needed} in it: choose another "
                "--out_dir, or put that elsewhere first"
            )
        return
    if not (folder / CONFIG).is_file() and _holds_something(folder, besides=RUN_FILES):
        remedy = "choose another, or give --overwrite to move it aside"
        if needed:
            remedy = f"choose another, for {needed} lies there"
        raise UserError(f"--out_dir {folder} holds other files and no run: {remedy}")


def _refuse_links(folder: Path) -> None:
    """Raise a UserError for a link among a run's files: who unpacks a run did not choose it."""
    for name in sorted(RUN_FILES):
        path = folder / name
        kind = files.nonregular_kind(path, follow_symlinks=False)
        if name == "checkpoints" and path.is_symlink():
            raise UserError(
                f"--out_dir {folder}: {path} is a link to {path.readlink()}, and a run saves only "
                "into its own folder: move the whole run there and give --out_dir that folder, or "
                "a link to it"
            )
        if kind and not (name == "checkpoints" and path.is_dir()):
            raise UserError(
                f"--out_dir {folder}: {path} is {kind}, which is neither read nor written through: "
                "remove it, or choose another --out_dir"
            )


def is_finished_read_only(folder: Path) -> bool:
    """Whether a run that came to its end lies where nothing can be written any more."""
    return (
        (folder / CONFIG).is_file()
        and not os.access(folder, os.W_OK)
        and _tells_of("end", folder / "metrics.jsonl")
    )


def _why_not_aside(folder: Path) -> str:
    """What speaks against renaming a folder; empty if nothing does."""
    if files.real_path(folder) in (Path.cwd(), *Path.cwd().parents):
        return "it is the folder we are in"
    if os.path.ismount(folder):
        return "something is mounted there; choose a folder inside it"
    parent = folder.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{files.real_path(parent)} cannot be written to"
    # A run of its own in it may be somebody else's, or training at this moment.
    for depth in ("*", "*/*"):
        held = (
            lock.parent for lock in folder.glob(f"{depth}/{LOCK_FILE}") if is_locked(lock.parent)
        )
        saved = (path.parents[1] for path in folder.glob(f"{depth}/checkpoints/step-*"))
        if inner := next(chain(held, saved), None):
            return f"it holds the run {inner.name}; choose that, or another"
    return ""


def _needed_inside(config: Config, folder: Path) -> str:
    """The flag, with its value, that names something in a run folder; empty if none does.

    A run to start from may lie there: its weights and tokenizer are read before it is moved, and
    saved with the new run.
    """
    named = {"input": config.input}
    starts_inside = config.init_from and files.is_inside(folder, config.init_from)
    if Path(config.tokenizer).is_file() and not starts_inside:
        named["tokenizer"] = config.tokenizer
    return " and ".join(
        f"--{flag} {value}"
        for flag, value in named.items()
        if value and files.is_inside(folder, value)
    )


def _tells_of(event: str, metrics: Path) -> bool:
    """Whether there is such an event in a run's metrics."""
    wanted = f'"event": "{event}"'.encode()
    try:
        with files.open_regular(metrics, follow_symlinks=False) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_SCAN_BYTES))
            lines = iter(lambda: file.readline(MAX_LINE_BYTES), b"")
            return any(wanted in line for line in lines)
    except OSError:
        return False


def _holds_something(folder: Path, *, besides: Collection[str] = ()) -> bool:
    """Whether there is a file in it that is not hidden: a crash may leave hidden ones of ours."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(not name.startswith(".") for name in names.difference(besides))


def lock_run_dir(folder: Path) -> FolderLock:
    """Hold a run folder until what this returns is closed or the process ends.

    Raises:
        UserError: if another process holds it.
    """
    held = lock_folder(folder)
    if held is None:
        raise UserError(
            f"{folder.as_posix()} is being trained by another process: wait for it, or choose "
            "another --out_dir"
        )
    return held
