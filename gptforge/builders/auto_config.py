"""Presets that fit the text: its size, what the device reaches, a resumed run."""

import dataclasses
import logging
import time
from collections.abc import Collection

import torch

from gptforge.builders.recipe import FITTED_PRESETS, RECIPE_FIELDS, make_recipe
from gptforge.builders.resolve import (
    MODEL_FIELDS,
    config_of_run,
    is_set_by_run_file,
)
from gptforge.builders.seed import seed_everything
from gptforge.config import FIELDS, Config, merge
from gptforge.config_checks import validate
from gptforge.data.dataset import resolve_input
from gptforge.data.text_size import estimate_text_size
from gptforge.device import select_device, select_precision, synchronize
from gptforge.errors import UserError
from gptforge.presets import AUTO

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
    if config.preset not in FITTED_PRESETS or is_set_by_run_file(config):
        return config
    if (old := config_of_run(config)) is not None:
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
    recipe = make_recipe(
        size.num_bytes,
        FITTED_PRESETS[config.preset] or ("gpu" if torch_device.type == "cuda" else "cpu"),
        preset=config.preset,
        time_limit=time_limit,
        flops_per_second=world_size * _flops_per_second(torch_device, config) if time_limit else 0,
        explicit=fixed_values,
    )
    for line in recipe.reasons:
        logger.info(line)
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
