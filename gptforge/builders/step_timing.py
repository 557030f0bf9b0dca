"""Build a training step without a run, and time it in seconds however large the model is."""

import dataclasses
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from gptforge.builders.build_train_step import build_train_step
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.seed import seed_everything
from gptforge.checkpoint.run_dir import OpenedRun
from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.device import select_device, select_precision
from gptforge.estimate.formulas import flops_per_token
from gptforge.model import GPT
from gptforge.report.log_handler import log_to
from gptforge.train.train_step import TrainStep

logger = logging.getLogger(__name__)

MAX_FLOPS, MAX_FLOPS_CUDA = 1e12, 1e14
"""FLOPs of one timed pass; on a CPU about 2 seconds, with two cores and bfloat16."""
MIN_LAYERS = 4
"""Layers of the deeper of two models to extrapolate from: with fewer, the error grows too large."""
MIN_SECONDS, MAX_SECONDS = 1.0, 4.0
"""Three passes are enough after the first, and one after the second."""
MIN_CPU_SHARE = 0.8
"""CPU time over wall time below which other programs use the cores: an idle machine gave 0.97 to 1,
one busy program beside it 0.5, with passes three to five times as slow."""


@dataclass(frozen=True)
class StepTiming:
    """Seconds to train on one sequence, and how they were measured."""

    seconds_per_sequence: float
    how: str


def build_bench_step(config: Config, explicit: Collection[str]) -> TrainStep:
    """Build model, optimizer and kernels as for training; write nothing to disk.

    Raises:
        UserError: for a configuration that cannot be trained.
    """
    validate(config)
    device, description = select_device(config.device)
    precision = select_precision(config.dtype, device)
    logger.info(f"device: {device} ({description}), {precision.name}: {precision.reason}")
    seed_everything(config)  # sets what cuBLAS reads when the warmup starts it
    return build_train_step(
        config,
        OpenedRun("new", config),
        device,
        precision,
        explicit=explicit,
        wait_for_warmup=KernelWarmup(device, config, precision).wait,
    )


def build_random_model(config: Config) -> GPT:
    """Build a model with random weights on its device, for inference.

    Raises:
        UserError: for an invalid configuration.
    """
    validate(config)
    device, description = select_device(config.device)
    logger.info(f"device: {device} ({description})")
    seed_everything(config)
    with device:
        return GPT(config.model).init_weights().eval()


def time_step(
    config: Config, explicit: Collection[str], *, device: torch.device, micro_batch: int
) -> StepTiming:
    """Time forward and backward of a configuration.

    All layers of a GPT-2 take the same time. Of a model too large for seconds, one layer and a few
    are timed, and the line through both is extrapolated to all layers.

    Args:
        config: resolved; has to fit into memory, else a RunError is raised.
        explicit: names of the fields that the user set.
        device: to run on.
        micro_batch: sequences that training would run at once; at most so many are run.
    """
    accumulation = max(1, config.global_batch_size // micro_batch)
    would_compile = config.compile == "true" or (config.compile, device.type) == ("auto", "cuda")
    config = dataclasses.replace(
        config,
        init_from="",
        device=str(device),
        compile="false",
        batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
    )
    max_flops = MAX_FLOPS_CUDA if device.type == "cuda" else MAX_FLOPS
    sequences, depths = _affordable(config, micro_batch, max_flops)
    seconds, cpu_share, is_manual = [], 1.0, True
    for n_layer in depths:
        shallow = dataclasses.replace(config, n_layer=n_layer)
        with log_to(lambda text: None):
            step = build_bench_step(shallow, {*explicit, "batch_size"})
        fastest, cpu_share = _time_passes(step, sequences, config.context_length)
        seconds.append(fastest / sequences)
        is_manual = step.kernels.manual_backward
        del step
    total = seconds[-1]
    how = f"forward and backward of {sequences} sequence{'s' * (sequences > 1)}"
    if len(depths) > 1:
        per_layer = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
        total += max(0.0, per_layer) * (config.n_layer - depths[1])
        how += f" through {depths[0]} and {depths[1]} of {config.n_layer} layers, extrapolated"
    if would_compile and not is_manual:
        how += ", without torch.compile, which takes longer than this plan"
    if device.type == "cpu" and cpu_share < MIN_CPU_SHARE:
        how += f"; other programs took {1 - cpu_share:.0%} of the cores: without them it is faster"
    return StepTiming(total, how)


def _affordable(config: Config, micro_batch: int, max_flops: float) -> tuple[int, list[int]]:
    """Sequences, and depths of the models to time, for passes of at most `max_flops`."""
    length, n_layer = config.context_length, config.n_layer
    one, two, full = (
        length * flops_per_token(dataclasses.replace(config, n_layer=n).model, length)
        for n in (1, 2, n_layer)
    )
    if n_layer <= MIN_LAYERS or full <= max_flops:
        return max(1, min(micro_batch, int(max_flops // full))), [n_layer]
    return 1, [1, max(MIN_LAYERS, 1 + int((max_flops - one) // (two - one)))]


def _time_passes(step: TrainStep, sequences: int, context_length: int) -> tuple[float, float]:
    """Seconds of the fastest pass, and the share of the cores' time that the passes got."""
    seconds: list[float] = []
    start = time.process_time()
    while sum(seconds) < MAX_SECONDS and (len(seconds) < 3 or sum(seconds) < MIN_SECONDS):
        seconds.append(step.dry_run(sequences, context_length))
    cpu_share = (time.process_time() - start) / (sum(seconds) * torch.get_num_threads())
    return min(seconds), cpu_share
