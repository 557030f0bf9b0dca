"""Presets that fit the text: auto and shakespeare by its size, finetune by its tokens."""

import dataclasses
import logging
import time
from collections.abc import Collection, Mapping
from typing import Any

import torch

from gptforge.builders.resolve import MODEL_FIELDS, config_of_run, is_set_by_run_file
from gptforge.config import FIELDS, Config, merge
from gptforge.config_checks import validate
from gptforge.data.dataloader import sequences_per_epoch
from gptforge.data.dataset import Dataset, resolve_input
from gptforge.data.prepare.request import TextOptions, estimate_text_size
from gptforge.device import seed_everything, select_device, select_precision, synchronize
from gptforge.errors import UserError
from gptforge.presets import AUTO, FINETUNE
from gptforge.printable import pluralize
from gptforge.recipe import FITTED_PRESETS, RECIPE_FIELDS, Recipe, make_recipe
from gptforge.report.format import format_bytes, format_epochs

logger = logging.getLogger(__name__)

TRAINING_EFFICIENCY = 0.25
"""FLOP/s of training over those of a large matmul; the recipes' models have small matrices."""
MATMUL_SIZES = {"cuda": 8192, "mps": 2048, "cpu": 1024}

# Of --preset finetune
EPOCHS = 3
"""Passes over the text, as in GPT-1's fine-tuning (Radford et al., 2018): a pretrained model soon
memorizes a small text."""
MIN_STEPS_PER_EPOCH = 100
"""For a text with fewer steps of full batches than this, the batch shrinks."""
MIN_SEQUENCES, MAX_TOKENS = 4, 2**15  # bounds of the global batch
GPT2_SMALL_LR, GPT2_SMALL_WIDTH = 1e-4, 768
MAX_LR = 1e-3  # that of training from scratch: an upper bound for narrow models
EVALS_PER_EPOCH = 5
RESOLVED_FIELDS = frozenset(
    {
        *("batch_size", "gradient_accumulation_steps", "max_steps", "max_lr", "min_lr"),
        *("warmup_steps", "eval_every", "patience", "save_every", "sample_every", "log_every"),
    }
)


def resolve_auto(
    config: Config, explicit: Collection[str], *, device: str, world_size: int = 1
) -> Config:
    """Fill in the fields that auto and the shakespeare presets leave to the text.

    Other presets are unchanged. A run that resumes keeps its own values, and so does the
    configuration file of a run: they do not depend on this rule any more.

    Raises:
        UserError: if auto does not find out the size of the text.
    """
    if config.preset not in FITTED_PRESETS or is_set_by_run_file(config):
        return config
    if (old := config_of_run(config)) is not None:
        return _with_values_of(old, config, RECIPE_FIELDS.difference(explicit))
    others = {n: getattr(config, n) for n in FIELDS.keys() - RECIPE_FIELDS - MODEL_FIELDS}
    validate(Config(**others))
    try:
        options = TextOptions(
            val_fraction=config.val_fraction, kind=config.kind, split_by_name=config.split_by_name
        )
        size = estimate_text_size(resolve_input(config.input), options)
    except UserError:
        if config.preset == AUTO:
            raise
        # For a text of the usual size; a mistake is found when the text is read. A pipe can be read
        # only once, and each teacher reads the text.
        none = {name: 0 for name in ("teachers", "teacher_steps") if name not in explicit}
        return merge(config, none, source=f"preset {config.preset}")
    if not size.num_bytes:
        return config  # an empty text is an error when it is read
    fixed = set(explicit)
    if config.init_from:
        fixed |= {*MODEL_FIELDS, "tokenizer", "context_length"}
    torch_device, _ = select_device(device)
    fixed_values = {name: getattr(config, name) for name in fixed if name in FIELDS}
    if size.tokenizer_name:
        fixed_values["tokenizer"] = size.tokenizer_name
    time_limit = config.time_limit if config.preset == AUTO else 0.0
    device_class = FITTED_PRESETS[config.preset]
    device_class = device_class or ("gpu" if torch_device.type == "cuda" else "cpu")
    recipe = make_recipe(
        size.num_bytes,
        device_class,
        preset=config.preset,
        time_limit=time_limit,
        flops_per_second=world_size * _flops_per_second(torch_device, config) if time_limit else 0,
        explicit=fixed_values,
    )
    logger.info(
        f"{config.preset}: about {format_bytes(size.num_bytes)} of text to train on, "
        f"{device_class.upper()}"
    )
    for line in explain_recipe(recipe, fixed_values, explicit, time_limit=time_limit):
        logger.info(f"  {line}")
    return merge(config, recipe.values, source=f"preset {config.preset}")


def _flops_per_second(device: torch.device, config: Config) -> float:
    """About what training reaches on a device, from the time of a matmul."""
    seed_everything(config)  # sets what cuBLAS reads when it starts
    size = MATMUL_SIZES[device.type]
    x = torch.ones(size, size, device=device, dtype=select_precision(config.dtype, device).dtype)
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        x @ x
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return TRAINING_EFFICIENCY * 2 * size**3 / best


def explain_recipe(
    recipe: Recipe,
    fixed: Mapping[str, Any],
    explicit: Collection[str],
    *,
    time_limit: float = 0.0,
) -> list[str]:
    """Explain the chosen values. Of the `fixed` ones, those in `explicit` were set by the user."""
    v: dict[str, Any] = {**recipe.values, **fixed}
    vocabulary = {
        "char": "a larger vocabulary would need more text",
        "bpe": "a vocabulary learned from this text, larger for more text",
        "gpt2": "enough text for GPT-2's vocabulary",
    }
    tokenizer = f"tokenizer {v['tokenizer']}"
    if v["tokenizer"] in vocabulary and "tokenizer" not in fixed:
        tokenizer += f": {vocabulary[v['tokenizer']]}"
    regularization = ": they keep the model from memorizing what it reads many times"
    if not v["dropout"]:
        regularization = ": with so much text, or so small a model, there is little to memorize"
    if "dropout" in fixed:
        regularization = ""
    decay = f"weight_decay {v['weight_decay']:g}"
    if v["optimizer"] == "muon":
        decay += f" ({v['muon_weight_decay']:g} with Muon)"
    limited = f", as large as --time_limit {time_limit:g} allows" if recipe.is_limited else ""
    sequences = v["batch_size"] * v["gradient_accumulation_steps"]
    lines = [
        tokenizer,
        f"{pluralize(v['n_layer'], 'layer')} x {v['n_embd']}, sequences of "
        f"{v['context_length']:,} tokens{limited}",
        f"{decay}, dropout {v['dropout']:g}, token_noise {v['token_noise']:g}{regularization}",
        f"{v['max_steps']:,} steps of {pluralize(sequences, 'sequence')}, "
        f"{v['optimizer']}, max_lr {v['max_lr']:g}, ema {v['ema']:g}",
    ]
    if v["teachers"]:
        lines.append(
            f"before that {pluralize(v['teachers'], 'teacher')} of "
            f"{v['teacher_steps'] or v['max_steps']:,} steps: the model learns from their "
            "probabilities, too"
        )
    if shown := sorted(RECIPE_FIELDS.intersection(explicit)):
        lines.append(f"explicit: {', '.join(f'{name} {fixed[name]}' for name in shown)}")
    return lines


def resolve_finetune(config: Config, dataset: Dataset, explicit: Collection[str]) -> Config:
    """Fill in steps, batch size, learning rates and cadence of `--preset finetune`.

    Explicit fields are kept, and a run that resumes keeps all of its own. Other presets are
    returned unchanged.
    """
    if config.preset != FINETUNE or is_set_by_run_file(config):
        return config
    if (old := config_of_run(config)) is not None:
        return _with_values_of(old, config, RESOLVED_FIELDS.difference(explicit))
    values = _finetune_values(config, dataset, explicit)
    unset = {name: value for name, value in values.items() if name not in explicit}
    return dataclasses.replace(config, **unset)


def _with_values_of(old: Config, config: Config, names: Collection[str]) -> Config:
    """A configuration with these values of the run that it resumes."""
    config = dataclasses.replace(config, **{name: getattr(old, name) for name in names})
    if "warmup_steps" in names:
        # Fewer --max_steps than the run has are valid: when it is opened, it keeps its own.
        config = dataclasses.replace(
            config, warmup_steps=min(config.warmup_steps, config.max_steps)
        )
    return config


def _finetune_values(config: Config, dataset: Dataset, explicit: Collection[str]) -> dict[str, Any]:
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
    epochs = format_epochs(max_steps * global_batch / sequences)
    logger.info(
        f"fine-tuning: {max_steps} steps of {global_batch} sequences, {epochs} epochs; learning "
        f"rates up to {max_lr:.2g}"
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
