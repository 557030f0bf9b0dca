"""From a run on the disk back to a model that writes."""

from collections.abc import Callable
from pathlib import Path

import torch

from gptforge.checkpoint import store as checkpoints
from gptforge.config import GPTConfig
from gptforge.convert.bundle import ModelBundle, validate_state_dict
from gptforge.convert.hf import is_hf_dir, read_hf
from gptforge.convert.hub import OPENAI_MODELS
from gptforge.device import select_device, select_precision
from gptforge.errors import UserError
from gptforge.estimate import formulas
from gptforge.inference.language_model import LanguageModel
from gptforge.printable import print_stderr

MAX_FLOAT32_PARAMS = 30_000_000
"""Parameters below which a CPU writes faster in float32: the weights fit its caches anyway."""
MAX_SINGLE_THREAD_PARAMS = 4_000_000
"""Parameters below which one CPU thread writes a text as fast as two."""


def load(
    run: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    log: Callable[[str], None] | None = None,
) -> LanguageModel:
    """The model that a run made, ready to write.

    Args:
        run: a run folder (its best checkpoint is taken, else its last), a checkpoint folder, or a
            folder that transformers or `export --to hf` wrote.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: type to write in: auto, float32, bfloat16 or float16. Logits are always float32.
        say: told what should be known while writing; None: standard error is.

    Raises:
        UserError: if there is no checkpoint there, or it is damaged.
    """
    parts = load_parts(run)
    place, _ = select_device(str(device))
    return LanguageModel(
        parts.build_model().to(place),
        parts.tokenizer,
        dtype=inference_dtype(dtype, place, parts.config),
        frozen=True,
        log=log or print_stderr,
    )


def limit_threads(model: LanguageModel) -> None:
    """Give this process one CPU thread if its model is small; for programs, not for libraries.

    A text from a small model takes no longer on one: its steps are microseconds. On more, wherever
    other programs want the cores too, each step waits for the last of them: 10 to 60 times longer.
    """
    if (
        model.device.type == "cpu"
        and formulas.num_params(model.model.config) < MAX_SINGLE_THREAD_PARAMS
    ):
        torch.set_num_threads(1)


def load_parts(run: str | Path) -> ModelBundle:
    """Shape, weights and tokenizer of a run, a checkpoint or an exported model.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    if not isinstance(run, str | Path) or not str(run):
        raise UserError(f"{run!r} is no run: give the path of a run folder or a checkpoint folder")
    if is_hf_dir(Path(run)):
        return read_hf(Path(run))
    if not Path(run).exists() and str(run).removeprefix("openai-community/") in OPENAI_MODELS:
        raise UserError(
            f"{run} does not exist here: fetch it once, gptforge import {run} runs/{Path(run).name}"
            f", and give runs/{Path(run).name}"
        )
    tried: set[Path] = set()
    while True:
        path = checkpoints.resolve_checkpoint(str(run))
        try:
            return _parts_of(path)
        except (UserError, OSError):
            # A training beside us may have deleted it since: then there is a newer one.
            if path.is_dir() or path in tried:
                raise
            tried.add(path)


def _parts_of(path: Path) -> ModelBundle:
    if reason := checkpoints.find_corruption(path, checkpoints.INFERENCE_FILES):
        others = [
            other.as_posix()
            for other in sorted(path.parent.glob("step-*"), reverse=True)
            if other != path and not checkpoints.find_corruption(other, checkpoints.INFERENCE_FILES)
        ]
        which = f"{others[0]} is whole" if others else "give another checkpoint folder"
        raise UserError(f"{path.as_posix()} is damaged: {reason}; {which}")
    config = checkpoints.read_config(path)
    tokenizer = checkpoints.read_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path.as_posix()}: the tokenizer has more ids than the model has rows")
    tensors = checkpoints.read_tensors(path, checkpoints.MODEL)
    return ModelBundle(
        config.model, validate_state_dict(tensors, config.model, source=path.as_posix()), tokenizer
    )


def inference_dtype(flag: str, device: torch.device, config: GPTConfig) -> torch.dtype:
    """The type to write in that `--dtype` asks for, or the one that is fastest here."""
    if flag not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {flag}: give auto, float32, bfloat16 or float16")
    if flag == "auto" and device.type == "cpu" and formulas.num_params(config) < MAX_FLOAT32_PARAMS:
        return torch.float32
    return select_precision(flag, device).dtype
