"""The files of one checkpoint, and the names of checkpoints.

The manifest, with sizes and SHA-256, is written last; a checkpoint is intact if and only if it
matches its manifest.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file

from gptforge import files
from gptforge.checkpoint.state_dict import StateDict, save_safetensors
from gptforge.config import Config, merge
from gptforge.config_checks import validate
from gptforge.config_file import read_toml
from gptforge.errors import RunError, UserError, error_reason, explain_os_error, parsing, runs_hint
from gptforge.estimate.formulas import num_params
from gptforge.printable import short_repr
from gptforge.shell import quote
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
MAX_EXTRA_BYTES = 2**27
"""Bytes of a safetensors file besides the model's: names, and the ranks' random generators."""

NAME = re.compile(r"step-(\d{6,})")
LINK_TARGET = re.compile(rf"{NAME.pattern}(\.(diverged|decayed)-\d+)?")

T = TypeVar("T")


def step_from_path(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    match = LINK_TARGET.fullmatch(path.name)
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
    def tensors(self) -> dict[str, StateDict]:
        """The tensors by file."""
        return {MODEL: self.model, OPTIMIZER: self.optimizer, RNG_STATE: self.rng_state}

    @property
    def nbytes(self) -> int:
        """Total size of the tensors."""
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


def is_folder(path: Path) -> bool:
    """Whether a path is a folder and not a link, which could lead anywhere."""
    return path.is_dir() and not path.is_symlink()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, intact or not."""
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if NAME.fullmatch(path.name))
    return sorted(filter(is_folder, paths), key=step_from_path)


def read_link(link: Path) -> Path | None:
    """The checkpoint that `best` or `last` points to, if it exists."""
    name = files.read_link(link) or ""
    path = link.with_name(name) if LINK_TARGET.fullmatch(name) else None
    return path if path is not None and is_folder(path) else None


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, StateDict],
    *,
    tokenizer: Tokenizer,
    config: str,
    state: Mapping[str, Any] | None = None,
) -> None:
    """Fill an empty folder with a checkpoint; for inference, the model's tensors are enough."""
    if state is not None:
        (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
    written = {}
    for name, group in tensors.items():
        with files.add_filename_to_errors(folder / name):
            written[name] = save_safetensors(folder / name, group)
    (folder / CONFIG).write_text(config, "utf-8")
    save_tokenizer(tokenizer, folder / TOKENIZER)
    listed = {}
    for path in sorted(folder.iterdir()):
        files.fsync(path)
        # Tensor files were hashed while they were written: reading them again would hash what a
        # faulty disk returns.
        size, digest = written.get(path.name) or (path.stat().st_size, files.sha256(path))
        listed[path.name] = {"bytes": size, "sha256": digest}
    record = {"format": "gptforge-checkpoint", "version": 1, "files": listed}
    files.atomic_write(folder / MANIFEST, json.dumps(record, indent=1) + "\n")


def find_corruption(path: Path, names: Iterable[str] = CHECKPOINT_FILES) -> str | None:
    """What is wrong with the named files of a checkpoint; None if they are intact.

    A RunError if the system does not allow to read them, so that their state is unknown.
    """
    try:
        manifest = json.loads(files.read_text(path / MANIFEST, follow_symlinks=False))
        listed = dict(manifest["files"])
        for name in names:
            file = path / name
            if kind := files.nonregular_kind(file, follow_symlinks=False):
                return f"{name} is {kind}, not a regular file"
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
        reason, fix = explain_os_error(error)
        raise RunError(
            f"{Path(error.filename or path).as_posix()}: {reason}: a checkpoint that cannot be "
            f"read is left as it is; {fix or 'check the disk'}, or move the checkpoint elsewhere "
            "to resume from another"
        ) from None
    except Exception as error:
        return f"{MANIFEST} cannot be read: {error_reason(error)}"
    return None


def resolve_checkpoint(run: str) -> Path:
    """The checkpoint that RUN names: itself, or a run's best one, else its last, or a UserError."""
    path = Path(run)
    if path.name in ("best", "last"):
        path = read_link(path) or path
    if (path / MANIFEST).is_file():
        # Not a link: while the run trains it may point elsewhere a moment later.
        return files.real_path(path) if path.is_symlink() else path
    is_checkpoints = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
    folder = path if is_checkpoints else path / "checkpoints"
    latest = list_checkpoints(folder)[-1:]
    for found in (read_link(folder / "best"), read_link(folder / "last"), *latest):
        if found:
            return found
    problem = "does not exist"
    if path.is_dir() and NAME.fullmatch(path.name):
        problem = f"is damaged: {MANIFEST} is missing"
    elif path.is_dir():
        is_run = folder.is_dir() or (path / CONFIG).is_file()
        problem = "has no checkpoint yet" if is_run else "is not the folder of a run"
    elif path.exists():
        problem = "is a file"
    elif siblings := list_checkpoints(path.parent):
        problem = f"does not exist; the latest is {siblings[-1].name}"
    hint = "give a run folder or a checkpoint folder"
    if path.is_file() and path.suffix in (".pt", ".pth", ".ckpt"):
        hint += f"; from nanoGPT's ckpt.pt: gptforge import {quote(run)} OUT"
    if problem == "does not exist":
        hint += f"; {runs_hint()}"
    raise UserError(f"{run} {problem}: {hint}")


def read_checkpoint(run: str, read: Callable[[Path], T]) -> T:
    """What `read` returns for the checkpoint that RUN names, which is resolved once.

    A run that trains on may delete that checkpoint meanwhile; then there is a newer one, which is
    read instead.
    """
    tried: set[Path] = set()
    while True:
        path = resolve_checkpoint(run)
        try:
            return read(path)
        except (UserError, OSError):
            if path.is_dir() or path in tried:
                raise
            tried.add(path)


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
        if not all(map(files.is_count, counts)):
            raise TypeError("a step was expected")
        if not set(state.get("pending", ())) <= {"evaluate", "sample", "save"}:
            raise ValueError(f"pending: {state['pending']}")
        state["text_sha256"].encode()
        return dict(state)


def read_config(path: Path, *, with_model: bool = True) -> Config:
    """Read and validate the configuration of a checkpoint.

    The model that it describes must fit the file of weights: a few bytes of a hostile config must
    not cause an allocation of a terabyte. Without `with_model` the file may be corrupt.
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
