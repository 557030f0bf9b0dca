"""Presets that fit the text, on this machine: its size, what the device reaches, a resumed run."""

import dataclasses
import logging
import time
from collections.abc import Collection
from pathlib import Path

import torch

from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.builders.recipe import FITTED_PRESETS, RECIPE_FIELDS, fit_steps, make_recipe
from gptforge.builders.resolve import MODEL_FIELDS, last_checkpoint
from gptforge.builders.seed import seed_everything
from gptforge.builders.step_timing import time_step
from gptforge.checkpoint import format as checkpoints
from gptforge.config import FIELDS, Config, merge, read_toml, validate
from gptforge.data.dataset import Dataset, resolve_input
from gptforge.data.text_size import estimate_text_size
from gptforge.device import Precision, select_device, select_precision, synchronize
from gptforge.errors import RunError, UserError
from gptforge.presets import AUTO
from gptforge.report.format import format_duration

logger = logging.getLogger(__name__)

TRAINING_EFFICIENCY = 0.25
"""FLOP/s of training over those of a large matmul: models of a recipe have small matrices."""
MATMUL_SIZES = {"cuda": 8192, "mps": 2048, "cpu": 1024}


def resolve_auto(
    config: Config, explicit: Collection[str], *, device: str, world_size: int = 1
) -> Config:
    """Fill in the fields that auto and the shakespeare presets leave to the text.

    Other presets are unchanged.

    A run that resumes keeps its own values, and so does the configuration file of a run: they do
    not depend on this rule any more.

    Args:
        config: after `resolve_init_from`.
        explicit: fields that the user set.
        device: `--device`, or that of this rank.
        world_size: ranks that share the work.

    Raises:
        UserError: if the size of the text is unknown.
    """
    if config.preset not in FITTED_PRESETS or _is_resolved(config):
        return config
    if (old := _config_of_run(config)) is not None:
        stored = {name: getattr(old, name) for name in RECIPE_FIELDS.difference(explicit)}
        return dataclasses.replace(config, **stored)
    others = {n: getattr(config, n) for n in FIELDS.keys() - RECIPE_FIELDS - MODEL_FIELDS}
    validate(Config(**others))
    try:
        size = estimate_text_size(
            resolve_input(config.input),
            val_fraction=config.val_fraction,
            kind=config.kind,
            split_by_name=config.split_by_name,
        )
    except UserError:
        if config.preset == AUTO:
            raise
        return config  # for a text of the usual size; a mistake is found when the text is read
    fixed = set(explicit)
    if config.init_from:
        fixed |= {*MODEL_FIELDS, "tokenizer", "context_length"}
    torch_device, _ = select_device(device)
    fixed_values = {name: getattr(config, name) for name in fixed if name in FIELDS}
    if size.tokenizer_name:
        fixed_values["tokenizer"] = size.tokenizer_name
    recipe = make_recipe(
        size.num_bytes,
        FITTED_PRESETS[config.preset] or ("gpu" if torch_device.type == "cuda" else "cpu"),
        preset=config.preset,
        time_limit=config.time_limit if config.preset == AUTO else 0.0,
        flops_per_second=world_size * _flops_per_second(torch_device, config),
        explicit=fixed_values,
    )
    for line in recipe.reasons:
        logger.info(line)
    return merge(config, recipe.values, source=f"preset {config.preset}")


def fit_time_limit(
    config: Config,
    explicit: Collection[str],
    dataset: Dataset,
    *,
    device: torch.device,
    precision: Precision,
    start_time: float,
    world_size: int = 1,
) -> Config:
    """Time a step, and cut the steps of `--preset auto` so that they end within `--time_limit`.

    Args:
        config: resolved.
        explicit: fields that the user set.
        dataset: to train on.
        device: to train on.
        precision: to train in.
        start_time: `time.monotonic()` from which the limit counts.
        world_size: ranks that share the work.
    """
    if config.preset != AUTO or not config.time_limit or "max_steps" in explicit:
        return config
    micro_batch = config.batch_size
    if "batch_size" not in explicit:
        micro_batch = MemoryEstimator(config, precision, device).micro_batch()
    try:
        timing = time_step(config, explicit, device=device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError):
        return config  # training reports it
    seconds = config.time_limit * 60 - (time.monotonic() - start_time)
    per_step = timing.seconds_per_sequence * config.global_batch_size / world_size
    val_tokens = len(dataset.val)
    fitted = fit_steps(
        config,
        explicit,
        seconds=seconds,
        seconds_per_step=per_step,
        val_tokens=min(val_tokens, config.eval_tokens or val_tokens),
    )
    if fitted.max_steps < config.max_steps:
        logger.info(
            f"auto: {fitted.max_steps:,} steps instead of {config.max_steps:,}, of "
            f"{1000 * per_step:.3g} ms each, to end within {format_duration(seconds)}"
        )
    return fitted


def _is_resolved(config: Config) -> bool:
    """Whether the values come from the configuration file of a run."""
    if not config.config:
        return False
    values, is_from_run = read_toml(Path(config.config))
    return is_from_run and values.get("preset") in FITTED_PRESETS


def _config_of_run(config: Config) -> Config | None:
    """The configuration of a run with this preset in the run folder."""
    last = last_checkpoint(config)
    if last is None or checkpoints.find_corruption(last, (checkpoints.CONFIG,)):
        return None
    old = checkpoints.read_config(last, with_model=False)
    return old if old.preset == config.preset else None


def _flops_per_second(device: torch.device, config: Config) -> float:
    """About what training reaches on a device, from the time of a matmul; 0 without a limit."""
    if not config.time_limit:
        return 0.0
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
