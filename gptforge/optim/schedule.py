"""Schedules of learning rate and dropout, as pure functions of the step."""

import math

from gptforge.config import Config


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of a step, from 0 to `max_steps`, where the decay ends.

    Linear warmup to `max_lr`, then the decay that `schedule` names:

    - cosine: half a cosine down to `min_lr` (Loshchilov and Hutter, 2017), as in GPT-3.
    - linear: a straight line down to `min_lr`.
    - wsd: warmup, stable, decay. `max_lr` until the last `decay_fraction` of the steps, then down
      to `min_lr` as 1 - sqrt(progress), better than a straight line (Haegele et al., 2024,
      arXiv:2405.18392). What precedes the decay does not depend on `max_steps`, so a longer run
      can resume from there.
    - constant: `max_lr` to the end.
    """
    c, start = config, decay_start(config)
    if step < c.warmup_steps:
        return c.max_lr * (step + 1) / c.warmup_steps
    if c.schedule == "constant" or step < start:
        return c.max_lr
    progress = (step - start) / max(1, c.max_steps - start)
    span = c.max_lr - c.min_lr
    if c.schedule == "cosine":
        # In this order of operations since version 0.1: runs are reproducible bit for bit.
        return c.min_lr + 0.5 * span * (1 + math.cos(math.pi * progress))
    # Subtracted from max_lr, to start with exactly that, as a longer wsd run does.
    return c.max_lr - span * (progress if c.schedule == "linear" else math.sqrt(progress))


def decay_start(config: Config) -> int:
    """The first step after the warmup, or after the stable part of wsd, at `max_lr`."""
    if config.schedule != "wsd":
        return config.warmup_steps
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    return max(config.warmup_steps, config.max_steps - decay_steps)


def stable_end(config: Config) -> int | None:
    """For wsd, the step whose checkpoint a longer run resumes from; else None."""
    return decay_start(config) if config.schedule == "wsd" else None


def ramped_dropout(config: Config, step: int) -> float:
    """The dropout of a step, with a ramp: a small text is overfit late, when dropout is needed."""
    return config.dropout * min(1.0, step / (config.dropout_ramp * config.max_steps))
