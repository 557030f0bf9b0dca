"""`--preset auto` with `--time_limit`: as many steps as end in time."""

import dataclasses
import logging
import math
import time
from collections.abc import Collection
from typing import Any

import torch

from gptforge.builders.memory_fit import MemoryEstimator
from gptforge.builders.recipe import (
    EVALUATIONS,
    USABLE_TIME,
    intervals,
    round_nicely,
    teacher_steps,
)
from gptforge.builders.resolve import config_of_run
from gptforge.builders.resolve_run import ResolvedRun
from gptforge.builders.seed import seed_everything
from gptforge.builders.step_timing import time_step
from gptforge.builders.train_teachers import cost_with_teachers
from gptforge.config import Config
from gptforge.errors import RunError
from gptforge.presets import AUTO
from gptforge.report.format import format_duration

logger = logging.getLogger(__name__)

MIN_STEPS_PER_EVAL = 10
"""Steps between evaluations, in steps that take as long as one evaluation."""


def fit_time_limit(run: ResolvedRun, *, start_time: float) -> ResolvedRun:
    """Rank 0 times a step, and all ranks make as many as end within `--time_limit`.

    Runs of other presets, without a limit or with explicit `--max_steps` are unchanged.

    Args:
        run: a new run.
        start_time: `time.monotonic()` from which the limit counts.
    """
    c, comm = run.config, run.comm
    if c.preset != AUTO or not c.time_limit or "max_steps" in run.explicit:
        return run
    run.wait_for_warmup()  # it would slow the steps that are timed
    values = comm.broadcast_from_rank0(lambda: vars(_fit_on_main(run, start_time)))
    seed_everything(c, rank=comm.rank)  # the steps drew dropout masks
    return dataclasses.replace(run, config=dataclasses.replace(c, **values))


def _fit_on_main(run: ResolvedRun, start_time: float) -> Config:
    c, explicit = run.config, run.explicit
    if config_of_run(c) is not None:
        return c  # its teachers have begun with these steps
    micro_batch = c.batch_size
    if "batch_size" not in explicit:
        micro_batch = MemoryEstimator(c, run.precision, run.device).micro_batch()
    try:
        timing = time_step(c, explicit, device=run.device, micro_batch=micro_batch)
    except (RunError, torch.OutOfMemoryError):
        return c  # training reports it
    seconds = c.time_limit * 60 - (time.monotonic() - start_time)
    per_step = timing.seconds_per_sequence * c.global_batch_size / run.comm.world_size
    follow = c.teacher_steps and "teacher_steps" not in explicit
    if c.teacher_steps and not follow:
        seconds -= c.teachers * c.teacher_steps * per_step
        per_step *= 1 + c.teachers / 3
    else:
        per_step *= cost_with_teachers(c)
    val_tokens = len(run.dataset.val)
    fitted = fit_steps(
        c,
        explicit,
        seconds=seconds,
        seconds_per_step=per_step,
        val_tokens=min(val_tokens, c.eval_tokens or val_tokens),
    )
    if follow:
        fitted = dataclasses.replace(fitted, teacher_steps=teacher_steps(fitted.max_steps))
    if fitted.max_steps < c.max_steps:
        logger.info(
            f"auto: {fitted.max_steps:,} steps instead of {c.max_steps:,}, of "
            f"{1000 * per_step:.3g} ms each{' with teachers' * bool(c.teachers)}, to end within "
            f"{format_duration(seconds)}"
        )
    return fitted


def fit_steps(
    config: Config,
    explicit: Collection[str],
    *,
    seconds: float,
    seconds_per_step: float,
    val_tokens: int,
) -> Config:
    """Cut max_steps so that the schedule ends within `seconds`, unless the user set it.

    Args:
        config: resolved.
        explicit: fields that the user set.
        seconds: left of the time limit.
        seconds_per_step: of training alone.
        val_tokens: that an evaluation reads.
    """
    # The forward is a third of a step's FLOPs.
    steps_per_eval = val_tokens / config.tokens_per_step / 3

    def eval_every(max_steps: int) -> int:
        if "eval_every" in explicit:
            return config.eval_every
        return round_nicely(max(max_steps / EVALUATIONS, MIN_STEPS_PER_EVAL * steps_per_eval))

    def steps_with_evals(max_steps: int) -> float:
        return max_steps + math.ceil(max_steps / eval_every(max_steps)) * steps_per_eval

    if "max_steps" in explicit:
        return config
    affordable = seconds * USABLE_TIME / seconds_per_step
    minimum = config.warmup_steps if "warmup_steps" in explicit else 1
    # Two digits: the time of a step is not known better.
    candidates = {digits * 10**zeros for zeros in range(7) for digits in range(1, 100)}
    candidates = {n for n in candidates if n < config.max_steps} | {config.max_steps}
    max_steps = max([minimum, *(n for n in candidates if steps_with_evals(n) <= affordable)])
    values: dict[str, Any] = {"max_steps": max_steps, **intervals(max_steps)}
    values["eval_every"] = eval_every(max_steps)
    values = {name: value for name, value in values.items() if name not in explicit}
    return dataclasses.replace(config, **values)
