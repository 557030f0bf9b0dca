"""The checkpoints folder of a run: each checkpoint written whole beside its place, then renamed.

A manifest with sizes and SHA-256 is written last. A folder without one, or that differs from it, is
damaged, and nothing else decides that.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from gptforge import files
from gptforge.checkpoint.state_dict import StateDict, save_safetensors
from gptforge.config import (
    Config,
    merge,
    read_toml,
    validate,
)
from gptforge.errors import (
    RunError,
    UserError,
    error_reason,
    parsing,
)
from gptforge.estimate import formulas
from gptforge.printable import short_repr
from gptforge.tokenizers import Tokenizer
from gptforge.tokenizers import load as load_tokenizer
from gptforge.tokenizers import save as save_tokenizer

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
RNG_STATE = "rng.safetensors"
STATE = "state.json"
TOKENIZER = "tokenizer.json"
CONFIG = "config.toml"
CHECKPOINT_FILES = (MODEL, OPTIMIZER, RNG_STATE, STATE, TOKENIZER, CONFIG)
INFERENCE_FILES = (MODEL, TOKENIZER, CONFIG)
"""What is needed to use a model; the rest is needed to go on training it."""

HEADROOM_BYTES = 8 * 2**20
"""Room for the logs and the picture beside a checkpoint."""

REPLACED = ".replaced"
"""End of the hidden name of a checkpoint while a newer one of the same step takes its place."""
MAX_EXTRA_BYTES = 2**27
"""What a file of tensors may have besides the model's: names, and the ranks' generators."""

_NAME = re.compile(r"step-(\d{6,})")
_LINKED = re.compile(rf"{_NAME.pattern}(\.diverged-\d+)?")


def step_from_path(path: Path) -> int:
    """The number of updates that a checkpoint folder's name states."""
    found = _LINKED.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on, taken at one step."""

    model: StateDict
    optimizer: StateDict
    rng_state: StateDict
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        groups = (self.model, self.optimizer, self.rng_state)
        return sum(tensor.nbytes for group in groups for tensor in group.values())


class CheckpointStore:
    """The folder `checkpoints/` of one run.

    Args:
        folder: where they lie.
        again: what goes on from the last one, for those who have to be told.
    """

    def __init__(self, folder: Path, *, resume_command: str = "the same command") -> None:
        self.folder = folder
        self._again = resume_command

    def save(self, step: int, snapshot: Snapshot, *, tokenizer: Tokenizer, config: str) -> str:
        """Write checkpoint `step-N`, whole or not at all, and point `last` at it; returns its name.

        Raises:
            RunError: if the disk has no room; what was saved before is untouched.
        """
        name = f"step-{step:06d}"
        partial = self.folder / f".{name}.partial"
        with self.disk_errors(name):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove(partial)
            self.check_disk_space(snapshot.nbytes)
            partial.mkdir()
            try:
                self._fill(partial, snapshot, tokenizer=tokenizer, config=config)
                self._replace(partial, name)
            except BaseException:
                files.remove(partial)
                raise
            self.set_link("last", name)
        return name

    @contextmanager
    def disk_errors(self, name: str) -> Iterator[None]:
        """Turn an error of the disk into a RunError: which file, what is kept, how to go on."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in files.DISK_FULL_ERRNOS
            what = "the disk filled up" if is_full else error.strerror or str(error)
            where = Path(error.filename or self.folder).as_posix()
            kept = self._kept("make room" if is_full else "mend the disk")
            raise RunError(f"{where}: {what} while saving {name}: {kept}") from error

    def check_disk_space(self, needed: int) -> None:
        """Raise a RunError unless so many bytes, and a little more, are free."""
        free = files.free_disk_bytes(self.folder)
        if free < needed + HEADROOM_BYTES:
            raise RunError(
                f"{self.folder}: a checkpoint and the logs take "
                f"{(needed + HEADROOM_BYTES) / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free: "
                f"{self._kept('make room')}"
            )

    def latest(
        self, accept: Callable[[Path], bool] = lambda path: True
    ) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a warning for each damaged one, which is set aside.

        Args:
            accept: whether a whole one may be taken; those that may not are passed over.
        """
        self._undo_replacing()
        warnings: list[str] = []
        for path in reversed(self.checkpoints()):
            reason = find_corruption(path)
            if reason is None and accept(path):
                return path, warnings
            if reason is None:
                continue
            aside = files.move_to_backup(path, "damaged")
            warnings.append(f"{path.name} is damaged ({reason}); set aside as {aside.name}")
        return None, warnings

    def has_history(self) -> bool:
        """Whether anything was ever saved here, whole or not."""
        return any(self.folder.glob("step-*"))

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = [
            path
            for path in self.folder.iterdir()
            if _NAME.fullmatch(path.name) and _is_folder(path)
        ]
        return sorted(found, key=step_from_path)

    def read_link(self, which: str) -> Path | None:
        """The checkpoint that `best` or `last` leads to, if it is there."""
        name = files.read_link(self.folder / which)
        path = self.folder / name if name and _LINKED.fullmatch(name) else None
        return path if path is not None and _is_folder(path) else None

    def set_link(self, which: str, name: str) -> None:
        """Make `best` or `last` lead to a checkpoint."""
        files.set_link(self.folder / which, name)

    def repair_links(self, latest: Path) -> None:
        """Make `last` and `best` lead where they should, as far as the newest checkpoint knows.

        A crash between a checkpoint and its pointers leaves them one behind; what else it left
        half done is deleted.
        """
        for leftover in self.folder.glob(".*.partial"):
            files.remove(leftover)
        best_step = int(read_state(latest)["progress"]["best_step"] or 0)
        best = self.folder / f"step-{best_step:06d}"
        for which, path in (("last", latest), ("best", best)):
            there = self.read_link(which)
            # By number: the best one may have been abandoned, under a name of its own.
            if (there is None or step_from_path(there) != step_from_path(path)) and path.is_dir():
                self.set_link(which, path.name)

    def discard_after(self, step: int) -> None:
        """Training starts again from `step`: checkpoints after it are renamed `step-N.diverged-k`.

        No resume may find them. `best` follows its checkpoint; `prune` deletes the others.
        """
        best = self.read_link("best")
        for path in self.checkpoints():
            if step_from_path(path) > step:
                aside = files.move_to_backup(path, "diverged")
                if path == best:
                    self.set_link("best", aside.name)
        if (self.folder / f"step-{step:06d}").is_dir():
            self.set_link("last", f"step-{step:06d}")

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest besides best and last, and what broken saves left."""
        safe = {self.read_link("best"), self.read_link("last")}
        others = [path for path in self.checkpoints() if path not in safe]
        leftovers = [*self.folder.glob(".step-*.partial"), *self.folder.glob("step-*.diverged-*")]
        leftovers = [path for path in leftovers if path not in safe]
        for path in [*others[: max(0, len(others) - keep)], *leftovers]:
            # Renamed first, so that a deletion cut short leaves no half of a checkpoint.
            hidden = path.with_name(f".{path.name.strip('.').removesuffix('.partial')}.partial")
            if hidden != path:
                path.rename(hidden)
            files.remove(hidden)

    def _replace(self, partial: Path, name: str) -> None:
        """Put a complete folder in its place, and delete the one it replaces.

        The step was saved before, by a run that was stopped there: that one is kept under a hidden
        name until the new one is in place. `_undo_replacing` repairs what a crash in between left.
        """
        target, hidden = self.folder / name, self.folder / f".{name}{REPLACED}"
        if _is_folder(target):
            files.remove(hidden)
            target.rename(hidden)
        elif os.path.lexists(target):
            files.move_to_backup(target, "old")
        partial.replace(target)
        files.fsync_dir(self.folder)
        files.remove(hidden)

    def _undo_replacing(self) -> None:
        for hidden in self.folder.glob(f".step-*{REPLACED}"):
            target = self.folder / hidden.name.removeprefix(".").removesuffix(REPLACED)
            if target.exists():
                files.remove(hidden)
            else:
                hidden.rename(target)

    def _fill(self, folder: Path, snapshot: Snapshot, *, tokenizer: Tokenizer, config: str) -> None:
        written = {}
        for name, tensors in (
            (MODEL, snapshot.model),
            (OPTIMIZER, snapshot.optimizer),
            (RNG_STATE, snapshot.rng_state),
        ):
            with files.add_filename_to_errors(folder / name):
                written[name] = save_safetensors(folder / name, tensors)
        (folder / STATE).write_text(json.dumps(snapshot.state, indent=1) + "\n", "utf-8")
        (folder / CONFIG).write_text(config, "utf-8")
        save_tokenizer(tokenizer, folder / TOKENIZER)
        _write_manifest(folder, written)

    def _kept(self, remedy: str) -> str:
        # Whole ones only: they are put in their place by one rename.
        steps = self.checkpoints()
        if not steps:
            return f"nothing had been saved yet: {remedy}, or give another --out_dir"
        return f"{steps[-1].name} is kept: {remedy}, and {self._again} goes on from there"


def _is_folder(path: Path) -> bool:
    """Whether a checkpoint may be there: a file by its name is none, and a link leads anywhere."""
    return path.is_dir() and not path.is_symlink()


def save_inference_checkpoint(
    folder: Path, tensors: StateDict, *, tokenizer: Tokenizer, config: str
) -> None:
    """Fill an empty folder with a checkpoint to write with, or to start from."""
    written = {MODEL: save_safetensors(folder / MODEL, tensors)}
    (folder / CONFIG).write_text(config, "utf-8")
    save_tokenizer(tokenizer, folder / TOKENIZER)
    _write_manifest(folder, written, INFERENCE_FILES)


def find_corruption(path: Path, contents: Iterable[str] = CHECKPOINT_FILES) -> str | None:
    """What is wrong with a checkpoint folder, as far as `contents` goes; None if it is whole.

    Raises:
        RunError: if the system does not let it be read, so that nobody knows.
    """
    try:
        manifest = json.loads(files.read_text(path / MANIFEST, follow_symlinks=False))
        listed = dict(manifest["files"])
        for name in contents:
            file = path / name
            if kind := files.nonregular_kind(file, follow_symlinks=False):
                return f"{name} is {kind}, not a regular file"
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != listed[name]["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {listed[name]['bytes']}"
            if files.sha256(file) != listed[name]["sha256"]:
                return f"{name} does not have the bytes that were saved"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except files.NonRegularFileError as error:
        return f"{Path(error.filename).name} is {error.strerror}"
    except (NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(str(error.filename)).name} is no file: {error.strerror}"
    except OSError as error:
        # Its bytes may be whole: to set it aside could cost what was learned.
        raise RunError(
            f"{Path(error.filename or path).as_posix()}: {error.strerror or error}: a checkpoint "
            "that cannot be read is left as it is; mend the disk or the file's rights, or move "
            "the checkpoint elsewhere to go on from another"
        ) from None
    except Exception as error:
        return f"{MANIFEST} cannot be read: {error_reason(error)}"
    return None


def resolve_checkpoint(run: str) -> Path:
    """The checkpoint folder that RUN stands for: itself, or a run's best one, else its last.

    Raises:
        UserError: if there is no checkpoint there.
    """
    path = Path(run)
    if path.is_file() and path.name in ("best", "last"):
        # Where there are no links, a pointer is a file.
        path = CheckpointStore(path.parent).read_link(path.name) or path
    if (path / MANIFEST).is_file():
        return path
    inside = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
    store = CheckpointStore(path if inside else path / "checkpoints")
    found = (
        store.read_link("best")
        or store.read_link("last")
        or next(reversed(store.checkpoints()), None)
    )
    if found is None:
        what = "does not exist"
        if path.is_dir() and _NAME.fullmatch(path.name):
            what = f"is damaged, for {MANIFEST} is missing"
        elif path.is_dir():
            what = "has no checkpoint yet"
        elif path.exists():
            what = "is a file"
        elif CheckpointStore(path.parent).checkpoints():
            what = (
                "is not there; the newest is " + CheckpointStore(path.parent).checkpoints()[-1].name
            )
        raise UserError(f"{run} {what}: give a run folder or a checkpoint folder")
    return found


def read_tensors(path: Path, name: str) -> StateDict:
    """One of a checkpoint's tensor files."""
    with parsing(path / name, "a readable safetensors file"):
        # An optimizer keeps two numbers a weight; a sparse file can claim any size.
        most = 3 * (path / MODEL).stat().st_size + MAX_EXTRA_BYTES
        files.check_file_size(path / name, most, follow_symlinks=False)
        tensors: StateDict = load_file(path / name)
    return tensors


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json, with the parts that a run needs to go on."""
    with parsing(path / STATE, "a state that a run saved"):
        state = json.loads(files.read_text(path / STATE, follow_symlinks=False))
        if state["version"] != 1:
            raise ValueError(f"version {short_repr(state['version'])}, this program knows 1")
        numbers = [*state["progress"].values(), *state["scaler"].values()]
        numbers += [*state.get("recent_losses", ()), *(state.get("partial") or {}).values()]
        numbers += [state["loader"]["position"], *state["file_sizes"].values()]
        if not all(number is None or files.is_finite_number(number) for number in numbers):
            raise TypeError("a number was expected")
        counts = [state["loader"]["position"], *state["file_sizes"].values()]
        counts += [state["progress"]["step"], state["progress"]["best_step"]]
        counts += [
            state["progress"].get(name, 0) for name in ("returns", "diverged_at", "bad_steps")
        ]
        partial = state.get("partial") or {}
        counts += [partial[name] for name in ("windows", "num_windows", "tokens") if partial]
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise TypeError("a step was expected")
        if not set(state.get("pending", ())) <= {"evaluate", "sample", "save"}:
            raise ValueError(f"pending: {state['pending']}")
        state["text_sha256"].encode()
        return dict(state)


def read_config(path: Path, *, with_model: bool = True) -> Config:
    """The configuration that a checkpoint was made with.

    It is checked, and the model that it describes must fit into the file of weights: a few bytes of
    text from a stranger must not make anybody build a model of a terabyte.

    Args:
        path: the checkpoint folder.
        with_model: whether the model will be built; without, its file may be damaged.
    """
    values, _ = read_toml(path / CONFIG)
    config = merge(Config(), values, source=str(path / CONFIG))
    validate(config)
    if not with_model:
        return config
    needed, size = 4 * formulas.num_params(config.model), (path / MODEL).stat().st_size
    if not needed <= size <= needed + MAX_EXTRA_BYTES:
        raise UserError(
            f"{path / CONFIG} describes a model of {needed:,} bytes, but {MODEL} has {size:,}"
        )
    return config


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a checkpoint."""
    return load_tokenizer(path / TOKENIZER)


def _write_manifest(
    folder: Path, written: Mapping[str, tuple[int, str]], contents: Iterable[str] = CHECKPOINT_FILES
) -> None:
    listed = {}
    for name in contents:
        files.fsync(folder / name)
        # What was hashed on its way out is not read again: that would hash the disk's mistakes.
        size, digest = written.get(name) or (
            (folder / name).stat().st_size,
            files.sha256(folder / name),
        )
        listed[name] = {"bytes": size, "sha256": digest}
    record = {"format": "gptforge-checkpoint", "version": 1, "files": listed}
    files.atomic_write(folder / MANIFEST, json.dumps(record, indent=1) + "\n")
