"""Load the model of a run, a checkpoint or an exported folder, for inference."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptforge.checkpoint import format as checkpoints
from gptforge.config import Config, GPTConfig
from gptforge.convert.bundle import ModelBundle, validate_state_dict
from gptforge.convert.hf import is_hf_dir, read_hf
from gptforge.convert.hub import OPENAI_MODELS
from gptforge.device import select_device, select_precision
from gptforge.errors import UserError, explain_os_errors
from gptforge.estimate.formulas import num_params
from gptforge.inference.language_model import LanguageModel

MAX_FLOAT32_PARAMS = 30_000_000
"""Up to this size a CPU generates faster in float32: the weights fit into its caches anyway."""
MAX_SINGLE_THREAD_PARAMS = 4_000_000  # up to this size one thread generates as fast as two


@dataclass(frozen=True)
class SavedModel:
    """A model, and what was saved with it. All of it is of one checkpoint, also of a run that
    trains on: nothing is read from that checkpoint later."""

    bundle: ModelBundle
    path: Path  # the checkpoint; the folder of an exported model
    config: Config | None  # None for an exported model
    state: Mapping[str, Any]  # of training, if it was asked for; empty without a run


@explain_os_errors()
def load(
    run: str | Path, *, device: str | torch.device = "auto", dtype: str = "auto"
) -> LanguageModel:
    """Load a trained model for inference.

    Args:
        run: a run folder (its best checkpoint, else the last), a checkpoint folder, or a folder
            that transformers or `export --to hf` wrote.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: auto, float32, bfloat16 or float16. Logits are always float32.

    Raises:
        UserError: if there is no checkpoint, or it is damaged.
    """
    return language_model(load_saved(run).bundle, device=device, dtype=dtype)


def language_model(
    bundle: ModelBundle, *, device: str | torch.device = "auto", dtype: str = "auto"
) -> LanguageModel:
    """A model on a device, for inference; see `load`."""
    torch_device, _ = select_device(str(device))
    return LanguageModel(
        bundle.build_model().to(torch_device),
        bundle.tokenizer,
        dtype=inference_dtype(dtype, torch_device, bundle.config),
        frozen=True,
    )


def limit_threads(model: LanguageModel) -> None:
    """Use one CPU thread if the model is small; for programs, not for libraries.

    Decoding steps of a small model take microseconds, and no longer on one thread. With more, and
    other programs on the same cores, each step waits for the slowest thread: 10 to 60 times longer.
    """
    if model.device.type == "cpu" and num_params(model.model.config) < MAX_SINGLE_THREAD_PARAMS:
        torch.set_num_threads(1)


def load_saved(run: str | Path, *, with_state: bool = False) -> SavedModel:
    """Load a model from a run, a checkpoint or an exported folder, perhaps with its training state.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if not isinstance(run, str | Path) or not str(run):
        raise UserError(f"{run!r} is not a run: give a run folder or a checkpoint folder")
    path = Path(run).expanduser()
    if is_hf_dir(path):
        return SavedModel(read_hf(path), path, None, {})
    if not path.exists() and str(path).removeprefix("openai-community/") in OPENAI_MODELS:
        raise UserError(
            f"{path} does not exist here: download it once with gptforge import {path} "
            f"runs/{path.name}, and give runs/{path.name}"
        )
    return checkpoints.read_checkpoint(
        str(path), lambda checkpoint: _load_checkpoint(checkpoint, with_state=with_state)
    )


def _load_checkpoint(path: Path, *, with_state: bool) -> SavedModel:
    state: dict[str, Any] = {}
    # First: a checkpoint that is deleted meanwhile must not seem to have no state.
    if with_state and (path / checkpoints.STATE).exists():
        state = checkpoints.read_state(path)
    if reason := checkpoints.find_corruption(path, checkpoints.INFERENCE_FILES):
        intact = (
            other.as_posix()
            for other in sorted(path.parent.glob("step-*"), reverse=True)
            if other != path and not checkpoints.find_corruption(other, checkpoints.INFERENCE_FILES)
        )
        other = next(intact, None)
        hint = f"{other} is intact" if other else "give another checkpoint folder"
        raise UserError(f"{path.as_posix()} is damaged: {reason}; {hint}")
    config = checkpoints.read_config(path)
    tokenizer = checkpoints.read_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path.as_posix()}: the tokenizer has more ids than the embedding")
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL)
    state_dict = validate_state_dict(tensors, config.model, source=path.as_posix())
    return SavedModel(ModelBundle(config.model, state_dict, tokenizer), path, config, state)


def inference_dtype(flag: str, device: torch.device, config: GPTConfig) -> torch.dtype:
    """Resolve `--dtype` for inference; auto is the fastest for this device and model size.

    Raises:
        UserError: for an unknown dtype.
    """
    if flag not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {flag}: give auto, float32, bfloat16 or float16")
    if flag == "auto" and device.type == "cpu" and num_params(config) < MAX_FLOAT32_PARAMS:
        return torch.float32
    return select_precision(flag, device).dtype
