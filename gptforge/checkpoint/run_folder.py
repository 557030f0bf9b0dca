"""Opening a run folder: a new run, one to go on with, or one that is finished."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptforge import files
from gptforge.checkpoint.store import CONFIG, CheckpointStore, read_config, read_state
from gptforge.config import Config, differences
from gptforge.errors import UserError


@dataclass(frozen=True)
class Opening:
    """What was found in a run folder."""

    status: Literal["new", "resume", "finished"]
    config: Config
    """As asked, in step with what the folder holds."""
    checkpoint: Path | None
    state: dict[str, Any]
    notices: tuple[str, ...]


def open_run(config: Config, *, given: Collection[str], text_sha256: str) -> Opening:
    """Look into `config.out_dir` and decide; moves an old run aside where `--overwrite` says so.

    Args:
        config: settled, with out_dir.
        given: fields that the user set by hand.
        text_sha256: of the text this run would learn.

    Raises:
        UserError: if the folder holds something else, or a run with another configuration.
    """
    folder = Path(config.out_dir)
    notices: list[str] = []
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out_dir {folder} is a file: choose another")
    if config.overwrite and folder.is_dir() and any(folder.iterdir()):
        aside = files.set_aside(folder, "old")
        notices.append(f"moved the old {folder.as_posix()} to {aside.as_posix()}")
    store = CheckpointStore(folder / "checkpoints")
    if not (folder / CONFIG).is_file() and _holds_something(folder):
        raise UserError(
            f"--out_dir {folder} holds other files and no run: choose another, or give --overwrite "
            "to move it aside"
        )
    newest, warnings = store.newest()
    notices += warnings
    if newest is None:
        if warnings:
            raise UserError(f"{'; '.join(warnings)}; none is left: start anew with --overwrite")
        # Nothing was learned yet: start over in place.
        for name in ("config.toml", "log.md", "metrics.jsonl", "samples.md"):
            files.remove(folder / name)
        return Opening("new", config, None, {}, tuple(notices))
    old = read_config(newest)
    if "warmup_steps" not in given:
        config = dataclasses.replace(config, warmup_steps=old.warmup_steps)
    state = read_state(newest)
    store.mend_pointers(newest)
    _insist_on_same(old, config, folder, state["text_sha256"] == text_sha256)
    if config.max_steps > old.max_steps:
        notices.append(
            f"--max_steps raised from {old.max_steps} to {config.max_steps}: "
            "the learning rate follows the new schedule from here"
        )
    is_finished = state["progress"]["step"] >= config.max_steps
    status: Literal["resume", "finished"] = "finished" if is_finished else "resume"
    return Opening(status, config, newest, state, tuple(notices))


def _holds_something(folder: Path) -> bool:
    """Whether there is a file in it that is not hidden: a crash may leave hidden ones of ours."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def _insist_on_same(old: Config, new: Config, folder: Path, is_same_text: bool) -> None:
    found = differences(old, new)
    if not is_same_text:
        found.append(f"input: the text is not the one that {folder.as_posix()} learned")
    if found:
        raise UserError(
            f"{folder.as_posix()} holds a run with another configuration ({'; '.join(found)}): "
            "choose another --out_dir, or --overwrite to move it aside"
        )
