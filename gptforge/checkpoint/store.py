"""The `checkpoints/` folder of a run.

A checkpoint is written to a temporary folder and renamed. Its manifest, with sizes and SHA-256, is
written last; a checkpoint is intact if and only if it matches its manifest.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from gptforge.estimate.formulas import num_params
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
"""The files needed to use a model; the others are needed to resume training."""

HEADROOM_BYTES = 8 * 2**20
"""Disk space for logs and plots besides a checkpoint."""

REPLACED = ".replaced"
"""Suffix of the hidden name of a checkpoint while a new one of the same step replaces it."""
MAX_EXTRA_BYTES = 2**27
"""Bytes of a safetensors file besides the model's: names, and the ranks' random generators."""

_NAME = re.compile(r"step-(\d{6,})")
_LINK_TARGET = re.compile(rf"{_NAME.pattern}(\.(diverged|decayed)-\d+)?")


def step_from_path(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = _LINK_TARGET.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


@dataclass(frozen=True)
class Snapshot:
    """All that is needed to resume a run from one step."""

    model: StateDict
    optimizer: StateDict
    rng_state: StateDict
    state: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Total size of the tensors."""
        groups = (self.model, self.optimizer, self.rng_state)
        return sum(tensor.nbytes for group in groups for tensor in group.values())


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: the folder `checkpoints/`.
        resume_command: what resumes the run, for errors.
    """

    def __init__(self, folder: Path, *, resume_command: str = "the same command") -> None:
        self.folder = folder
        self._resume_command = resume_command

    def save(self, step: int, snapshot: Snapshot, *, tokenizer: Tokenizer, config: str) -> str:
        """Write checkpoint `step-N`, complete or not at all, and link `last` to it.

        Returns:
            Its name.

        Raises:
            RunError: if the disk is full or fails; earlier checkpoints are untouched.
        """
        name = f"step-{step:06d}"
        partial = self.folder / f".{name}.partial"
        with self.disk_errors(name):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove(partial)
            self.check_disk_space(snapshot.nbytes)
            partial.mkdir()
            try:
                self._write(partial, snapshot, tokenizer=tokenizer, config=config)
                self._move_into_place(partial, name)
            except BaseException:
                files.remove(partial)
                raise
            self.set_link("last", name)
        return name

    @contextmanager
    def disk_errors(self, name: str) -> Iterator[None]:
        """Turn an OSError into a RunError that says what is kept and how to resume."""
        try:
            yield
        except OSError as error:
            is_full = error.errno in files.DISK_FULL_ERRNOS
            what = "the disk filled up" if is_full else error.strerror or str(error)
            where = Path(error.filename or self.folder).as_posix()
            kept = self._kept("make room" if is_full else "repair the disk")
            raise RunError(f"{where}: {what} while saving {name}: {kept}") from error

    def check_disk_space(self, nbytes: int) -> None:
        """Raise a RunError unless there is room for so many bytes and the logs."""
        needed, free = nbytes + HEADROOM_BYTES, files.free_disk_bytes(self.folder)
        if free < needed:
            raise RunError(
                f"{self.folder}: a checkpoint and the logs take {needed / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free: {self._kept('make room')}"
            )

    def latest(
        self, accept: Callable[[Path], bool] = lambda path: True
    ) -> tuple[Path | None, list[str]]:
        """The latest intact checkpoint, and a warning for each corrupt one, which is renamed.

        Args:
            accept: intact checkpoints for which it is false are skipped.
        """
        self._finish_replacing()
        warnings: list[str] = []
        for path in reversed(self.checkpoints()):
            problem = find_corruption(path)
            if problem is None:
                if accept(path):
                    return path, warnings
                continue
            backup = files.move_to_backup(path, "damaged")
            warnings.append(f"{path.name} is damaged ({problem}); renamed to {backup.name}")
        return None, warnings

    def path_of(self, step: int) -> Path:
        """The folder of the checkpoint of a step."""
        return self.folder / f"step-{step:06d}"

    def has_history(self) -> bool:
        """Whether any checkpoint was ever saved, intact or not."""
        return any(self.folder.glob("step-*"))

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, oldest first, intact or not."""
        if not self.folder.is_dir():
            return []
        paths = (path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return sorted(filter(_is_folder, paths), key=step_from_path)

    def read_link(self, which: str) -> Path | None:
        """The checkpoint that `best` or `last` points to, if it exists."""
        name = files.read_link(self.folder / which)
        path = self.folder / name if name and _LINK_TARGET.fullmatch(name) else None
        return path if path is not None and _is_folder(path) else None

    def set_link(self, which: str, name: str) -> None:
        """Point `best` or `last` to a checkpoint."""
        files.set_link(self.folder / which, name)

    def repair_links(self, latest: Path) -> None:
        """Point `last` and `best` to where the latest checkpoint says, and delete leftovers.

        A crash between a save and its links leaves them one checkpoint behind.
        """
        for leftover in self.folder.glob(".*.partial"):
            files.remove(leftover)
        best_step = int(read_state(latest)["progress"]["best_step"] or 0)
        best = self.path_of(best_step)
        for which, path in (("last", latest), ("best", best)):
            target = self.read_link(which)
            # By step: the best checkpoint may have been renamed by `discard_after`.
            if (target is None or step_from_path(target) != step_from_path(path)) and path.is_dir():
                self.set_link(which, path.name)

    def discard_after(self, step: int, why: Literal["diverged", "decayed"] = "diverged") -> None:
        """Rename checkpoints after `step` to `step-N.<why>-k`, so that no resume finds them.

        `best` follows its checkpoint; `prune` deletes the others.
        """
        best = self.read_link("best")
        for path in self.checkpoints():
            if step_from_path(path) > step:
                backup = files.move_to_backup(path, why)
                if path == best:
                    self.set_link("best", backup.name)
        if self.path_of(step).is_dir():
            self.set_link("last", self.path_of(step).name)

    def prune(self, keep: int, protected_step: int | None = None) -> None:
        """Delete all but best, last and the `keep` latest others, and what failed saves left.

        The checkpoint of `protected_step` is kept in addition.
        """
        protected = {self.read_link("best"), self.read_link("last")}
        if protected_step is not None:
            protected.add(self.path_of(protected_step))
        others = [path for path in self.checkpoints() if path not in protected]
        patterns = (".step-*.partial", "step-*.diverged-*", "step-*.decayed-*")
        leftovers = [path for pattern in patterns for path in self.folder.glob(pattern)]
        leftovers = [path for path in leftovers if path not in protected]
        for path in [*others[: max(0, len(others) - keep)], *leftovers]:
            # Renamed first, so that an interrupted deletion leaves no partial checkpoint.
            hidden = path.with_name(f".{path.name.strip('.').removesuffix('.partial')}.partial")
            if hidden != path:
                path.rename(hidden)
            files.remove(hidden)

    def _move_into_place(self, partial: Path, name: str) -> None:
        """Rename a complete folder, replacing a checkpoint of the same step.

        The old one keeps a hidden name until the new one is in place; `_finish_replacing` repairs
        what a crash in between left.
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

    def _finish_replacing(self) -> None:
        for hidden in self.folder.glob(f".step-*{REPLACED}"):
            target = self.folder / hidden.name.removeprefix(".").removesuffix(REPLACED)
            if target.exists():
                files.remove(hidden)
            else:
                hidden.rename(target)

    def _write(
        self, folder: Path, snapshot: Snapshot, *, tokenizer: Tokenizer, config: str
    ) -> None:
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

    def _kept(self, fix: str) -> str:
        # Checkpoints under their own name are complete, as they are renamed in one step.
        checkpoints = self.checkpoints()
        if not checkpoints:
            return f"nothing has been saved yet: {fix}, or give another --out_dir"
        return f"{checkpoints[-1].name} is kept: {fix}, and {self._resume_command} resumes from it"


def _is_folder(path: Path) -> bool:
    # A link could lead anywhere.
    return path.is_dir() and not path.is_symlink()


def save_inference_checkpoint(
    folder: Path, tensors: StateDict, *, tokenizer: Tokenizer, config: str
) -> None:
    """Fill an empty folder with a checkpoint for inference or as initial weights."""
    written = {MODEL: save_safetensors(folder / MODEL, tensors)}
    (folder / CONFIG).write_text(config, "utf-8")
    save_tokenizer(tokenizer, folder / TOKENIZER)
    _write_manifest(folder, written, INFERENCE_FILES)


def _write_manifest(
    folder: Path, written: Mapping[str, tuple[int, str]], names: Iterable[str] = CHECKPOINT_FILES
) -> None:
    listed = {}
    for name in names:
        path = folder / name
        files.fsync(path)
        # Tensor files were hashed while they were written: reading them again would hash what a
        # faulty disk returns.
        size, digest = written.get(name) or (path.stat().st_size, files.sha256(path))
        listed[name] = {"bytes": size, "sha256": digest}
    record = {"format": "gptforge-checkpoint", "version": 1, "files": listed}
    files.atomic_write(folder / MANIFEST, json.dumps(record, indent=1) + "\n")


def find_corruption(path: Path, names: Iterable[str] = CHECKPOINT_FILES) -> str | None:
    """What is wrong with the named files of a checkpoint; None if they are intact.

    Raises:
        RunError: if the system does not allow to read them, so that its state is unknown.
    """
    try:
        manifest = json.loads(files.read_text(path / MANIFEST, follow_symlinks=False))
        listed = dict(manifest["files"])
        for name in names:
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
        return f"{Path(str(error.filename)).name} is not a file: {error.strerror}"
    except OSError as error:
        # The bytes may be intact, and renaming the checkpoint could lose it.
        raise RunError(
            f"{Path(error.filename or path).as_posix()}: {error.strerror or error}: a checkpoint "
            "that cannot be read is left as it is; repair the disk or the file's permissions, or "
            "move the checkpoint elsewhere to resume from another"
        ) from None
    except Exception as error:
        return f"{MANIFEST} cannot be read: {error_reason(error)}"
    return None


def resolve_checkpoint(run: str) -> Path:
    """The checkpoint that RUN names: itself, or a run's best one, else its last.

    Raises:
        UserError: if there is none.
    """
    path = Path(run)
    if path.is_file() and path.name in ("best", "last"):
        # Links are files where the file system has none.
        path = CheckpointStore(path.parent).read_link(path.name) or path
    if (path / MANIFEST).is_file():
        return path
    is_checkpoints = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
    store = CheckpointStore(path if is_checkpoints else path / "checkpoints")
    found = store.read_link("best") or store.read_link("last") or next(
        reversed(store.checkpoints()), None
    )  # fmt: skip
    if found is not None:
        return found
    problem = "does not exist"
    if path.is_dir() and _NAME.fullmatch(path.name):
        problem = f"is damaged: {MANIFEST} is missing"
    elif path.is_dir():
        problem = "has no checkpoint yet"
    elif path.exists():
        problem = "is a file"
    elif siblings := CheckpointStore(path.parent).checkpoints():
        problem = f"does not exist; the latest is {siblings[-1].name}"
    raise UserError(f"{run} {problem}: give a run folder or a checkpoint folder")


def read_tensors(path: Path, name: str) -> StateDict:
    """Read one safetensors file of a checkpoint."""
    with parsing(path / name, "a readable safetensors file"):
        # The optimizer has two numbers per weight. A sparse file can claim any size.
        max_bytes = 3 * (path / MODEL).stat().st_size + MAX_EXTRA_BYTES
        files.check_file_size(path / name, max_bytes, follow_symlinks=False)
        tensors: StateDict = load_file(path / name)
    return tensors


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json and validate what resuming needs."""
    with parsing(path / STATE, "a state that a run saved"):
        state = json.loads(files.read_text(path / STATE, follow_symlinks=False))
        if state["version"] != 1:
            raise ValueError(f"version {short_repr(state['version'])}, this program knows 1")
        progress, partial = state["progress"], state.get("partial") or {}
        counts = [state["loader"]["position"], *state["file_sizes"].values()]
        numbers = [*progress.values(), *state["scaler"].values(), *counts]
        numbers += [*state.get("recent_losses", ()), *partial.values()]
        if not all(number is None or files.is_finite_number(number) for number in numbers):
            raise TypeError("a number was expected")
        counts += [progress["step"], progress["best_step"]]
        optional = ("returns", "diverged_at", "bad_steps", "evals_since_best")
        counts += [progress.get(name, 0) for name in optional]
        counts += [partial[name] for name in ("windows", "num_windows", "tokens") if partial]
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts):
            raise TypeError("a step was expected")
        if not set(state.get("pending", ())) <= {"evaluate", "sample", "save"}:
            raise ValueError(f"pending: {state['pending']}")
        state["text_sha256"].encode()
        return dict(state)


def read_config(path: Path, *, with_model: bool = True) -> Config:
    """Read and validate the configuration of a checkpoint.

    The model that it describes must fit the file of weights: a few bytes of a hostile config must
    not make anybody allocate a terabyte.

    Args:
        path: the checkpoint folder.
        with_model: False if the model will not be built; its file may then be corrupt.
    """
    values, _ = read_toml(path / CONFIG)
    config = merge(Config(), values, source=str(path / CONFIG))
    validate(config)
    if not with_model:
        return config
    needed, size = 4 * num_params(config.model), (path / MODEL).stat().st_size
    if not needed <= size <= needed + MAX_EXTRA_BYTES:
        raise UserError(
            f"{path / CONFIG} describes a model of {needed:,} bytes, but {MODEL} has {size:,}"
        )
    return config


def read_tokenizer(path: Path) -> Tokenizer:
    """Read the tokenizer of a checkpoint."""
    return load_tokenizer(path / TOKENIZER)
