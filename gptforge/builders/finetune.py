"""`--preset finetune`: what the recipe leaves open, from the model's width and the text's size."""

import dataclasses
import logging
from collections.abc import Collection
from typing import Any

from gptforge.builders.resolve import config_of_run, is_set_by_run_file
from gptforge.config import Config
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset
from gptforge.presets import FINETUNE

logger = logging.getLogger(__name__)

EPOCHS = 3
"""Passes over the text, as in GPT-1's fine-tuning (Radford et al., 2018): a pretrained model soon
memorizes a small text."""
MIN_STEPS_PER_EPOCH = 100
"""The batch shrinks for a text that does not have so many steps of full batches."""
MIN_SEQUENCES, MAX_TOKENS = 4, 2**15
"""Bounds of the global batch."""
GPT2_SMALL_LR, GPT2_SMALL_WIDTH = 1e-4, 768
MAX_LR = 1e-3
"""That of training from scratch: an upper bound for narrow models."""
EVALS_PER_EPOCH = 5
RESOLVED_FIELDS = (
    *("batch_size", "gradient_accumulation_steps", "max_steps", "max_lr", "min_lr"),
    *("warmup_steps", "eval_every", "patience", "save_every", "sample_every", "log_every"),
)


def resolve_finetune(config: Config, dataset: Dataset, explicit: Collection[str]) -> Config:
    """Fill in steps, batch size, learning rates and cadence of `--preset finetune`.

    Explicit fields are kept, and a run that resumes keeps all of its own. Other presets are
    returned unchanged.
    """
    if config.preset != FINETUNE or is_set_by_run_file(config):
        return config
    values: dict[str, Any]
    if (old := config_of_run(config)) is not None:
        values = {name: getattr(old, name) for name in RESOLVED_FIELDS}
    else:
        values = _recipe(config, dataset, explicit)
    unset = {name: value for name, value in values.items() if name not in explicit}
    return dataclasses.replace(config, **unset)


def _recipe(config: Config, dataset: Dataset, explicit: Collection[str]) -> dict[str, Any]:
    """Values of RESOLVED_FIELDS, given the explicit ones among them."""
    sequences = sequences_per_epoch(
        len(dataset.train), config.context_length, random_offset=config.random_offset
    )
    batch_size = config.batch_size
    if not {"batch_size", "gradient_accumulation_steps"}.intersection(explicit):
        batch_size = choose_batch_size(sequences, config.context_length)
    global_batch = batch_size * config.gradient_accumulation_steps
    epoch = -(-sequences // global_batch)  # steps
    max_steps = config.max_steps if "max_steps" in explicit else EPOCHS * epoch
    max_lr = config.max_lr if "max_lr" in explicit else choose_lr(config.n_embd)
    logger.info(
        f"fine-tuning: {max_steps} steps of {global_batch} sequences, "
        f"{max_steps * global_batch / sequences:.1f} epochs; learning rates up to {max_lr:.2g}"
    )
    return {
        "batch_size": batch_size,
        "max_steps": max_steps,
        "max_lr": max_lr,
        "min_lr": max_lr / 10,
        "warmup_steps": max(1, min(100, max_steps // 20)),
        "eval_every": max(1, epoch // EVALS_PER_EPOCH),
        "patience": EVALS_PER_EPOCH if len(dataset.val) else 0,
        "save_every": epoch,
        "sample_every": epoch,
        "log_every": max(1, min(10, epoch // 10)),
    }


def choose_batch_size(sequences: int, context_length: int) -> int:
    """The largest power of two with MIN_STEPS_PER_EPOCH steps per epoch, within the bounds."""
    most = max(MIN_SEQUENCES, MAX_TOKENS // context_length)
    size = min(most, max(MIN_SEQUENCES, sequences // MIN_STEPS_PER_EPOCH))
    return 1 << (size.bit_length() - 1)


def choose_lr(n_embd: int) -> float:
    """The highest learning rate: inversely proportional to the width.

    1e-4 for GPT-2 small, a tenth of that from scratch, and 4.8e-5 for GPT-2 xl. The best rate of
    Adam falls with the width in this way (Yang et al., "Tensor Programs V", 2022).
    """
    return min(MAX_LR, GPT2_SMALL_LR * GPT2_SMALL_WIDTH / n_embd)
