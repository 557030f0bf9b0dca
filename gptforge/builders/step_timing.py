"""Build a training step without a run, time it, and fit max_steps to a time limit."""

import dataclasses
import logging
import math
import time
from collections.abc import Collection
from typing import Any

import torch

from gptforge.builders.build_train_step import build_train_step
from gptforge.builders.kernel_warmup import KernelWarmup
from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.builders.resolve import config_of_run
from gptforge.builders.resolve_run import ResolvedRun
from gptforge.builders.teachers import cost_with_teachers
from gptforge.config import Config
from gptforge.config_checks import validate
from gptforge.device import seed_everything, select_device, select_precision
from gptforge.errors import RunError
from gptforge.estimate.formulas import flops_per_token
from gptforge.model import GPT
from gptforge.presets import AUTO
from gptforge.printable import pluralize
from gptforge.recipe import EVALUATIONS, USABLE_TIME, intervals, round_nicely, teacher_steps
from gptforge.report.format import format_duration
from gptforge.report.log_handler import log_to
from gptforge.training.dry_run import dry_run, time_optimizer
from gptforge.training.train_step import TrainStep

logger = logging.getLogger(__name__)

MAX_FLOPS, MAX_FLOPS_CUDA = 1e12, 1e14
"""FLOPs of one timed pass; on a CPU about 2 seconds, with two cores and bfloat16."""
MIN_LAYERS = 4
"""Layers of the deeper of two models to extrapolate from: with fewer, the error grows too large."""
MIN_SECONDS, MAX_SECONDS = 1.0, 4.0
"""Passes are timed for MAX_SECONDS, or until three have taken MIN_SECONDS."""
MIN_CPU_SHARE = 0.8
"""CPU time over wall time below which other programs use the cores: an idle machine gave 0.97 to 1,
one busy program beside it 0.5, with passes three to five times as slow."""
MIN_TRAINING_PER_EVAL = 10  # seconds of steps between evaluations, per second of one


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
    wait = KernelWarmup(device, config, precision).wait
    return build_train_step(config, device, precision, explicit=explicit, wait_for_warmup=wait)


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
) -> tuple[float, str]:
    """Time the steps of a resolved configuration.

    All layers of a GPT-2 take the same time. Of a model too large for seconds, one layer and a few
    are timed, and the line through both is extrapolated to all layers.

    Returns:
        Seconds to train on one sequence of a step, and how they were measured.

    Raises:
        RunError: if it does not fit into memory.
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
        seconds.append(fastest / sequences + time_optimizer(step) / config.global_batch_size)
        is_manual = step.kernels.manual_backward
        del step
    total = seconds[-1]
    how = f"forward and backward of {pluralize(sequences, 'sequence')}"
    if device.type == "cpu":
        how += " and an optimizer step"
    if len(depths) > 1:
        per_layer = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
        total += max(0.0, per_layer) * (config.n_layer - depths[1])
        how += f" through {depths[0]} and {depths[1]} of {config.n_layer} layers, extrapolated"
    if would_compile and not is_manual:
        how += ", without torch.compile, which takes longer than this plan"
    if device.type == "cpu" and cpu_share < MIN_CPU_SHARE:
        how += f"; other programs took {1 - cpu_share:.0%} of the cores: without them it is faster"
    return total, how


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
        seconds.append(dry_run(step, sequences, context_length))
    cpu_share = (time.process_time() - start) / (sum(seconds) * torch.get_num_threads())
    return min(seconds), cpu_share


def fit_time_limit(run: ResolvedRun) -> ResolvedRun:
    """Rank 0 times a step, and all ranks make as many as end within `--time_limit`.

    Runs of other presets, without a limit or with explicit `--max_steps` are unchanged.
    """
    c, comm = run.config, run.comm
    if c.preset != AUTO or not c.time_limit or "max_steps" in run.explicit:
        return run
    run.wait_for_warmup()  # it would slow the steps that are timed
    values = comm.broadcast_from_rank0(lambda: vars(_fit_on_main(run)))
    seed_everything(c, rank=comm.rank)  # the steps drew dropout masks
    return dataclasses.replace(run, config=dataclasses.replace(c, **values))


def _fit_on_main(run: ResolvedRun) -> Config:
    c, explicit = run.config, run.explicit
    if config_of_run(c) is not None:
        return c  # its teachers have begun with these steps
    micro_batch = MemoryEstimator(c, run.precision, run.device).micro_batch(explicit)
    try:
        per_sequence, _ = time_step(c, explicit, device=run.device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError):
        return c  # training reports it
    left = c.time_limit * 60 - (time.monotonic() - run.start.time)
    per_step = per_sequence * c.global_batch_size / run.comm.world_size
    val_tokens = min(len(run.dataset.val), c.eval_tokens or len(run.dataset.val))
    per_eval = per_step * val_tokens / c.tokens_per_step / 3  # the forward is a third of a step
    seconds = USABLE_TIME * left - c.teachers * per_eval  # each is evaluated once
    follow = c.teacher_steps and "teacher_steps" not in explicit
    if c.teacher_steps and not follow:
        seconds -= c.teachers * c.teacher_steps * per_step
        per_step *= 1 + c.teachers / 3
    else:
        per_step *= cost_with_teachers(c)
    fitted = fit_steps(
        c, explicit, seconds=seconds, seconds_per_step=per_step, seconds_per_eval=per_eval
    )
    if follow:
        fitted = dataclasses.replace(fitted, teacher_steps=teacher_steps(fitted.max_steps))
    if fitted.max_steps < c.max_steps:
        teachers = " with teachers" if c.teachers else ""
        logger.info(
            f"auto: {fitted.max_steps:,} steps instead of {c.max_steps:,}, of "
            f"{1000 * per_step:.3g} ms each{teachers}, to end within "
            f"{format_duration(left)}"
        )
    return fitted


def fit_steps(
    config: Config,
    explicit: Collection[str],
    *,
    seconds: float,
    seconds_per_step: float,
    seconds_per_eval: float,
) -> Config:
    """Cut max_steps so that steps and evaluations take at most `seconds`; explicit fields stay."""
    steps_per_eval = seconds_per_eval / seconds_per_step

    def eval_every(max_steps: int) -> int:
        if "eval_every" in explicit:
            return config.eval_every
        return round_nicely(max(max_steps / EVALUATIONS, MIN_TRAINING_PER_EVAL * steps_per_eval))

    def steps_with_evals(max_steps: int) -> float:
        return max_steps + math.ceil(max_steps / eval_every(max_steps)) * steps_per_eval

    affordable = seconds / seconds_per_step
    minimum = config.warmup_steps if "warmup_steps" in explicit else 1
    # Two digits: the time of a step is not known better.
    candidates = {digits * 10**zeros for zeros in range(7) for digits in range(1, 100)}
    candidates = {n for n in candidates if n < config.max_steps} | {config.max_steps}
    max_steps = max([minimum, *(n for n in candidates if steps_with_evals(n) <= affordable)])
    values: dict[str, Any] = {"max_steps": max_steps, **intervals(max_steps)}
    values["eval_every"] = eval_every(max_steps)
    values = {name: value for name, value in values.items() if name not in explicit}
    return dataclasses.replace(config, **values)
