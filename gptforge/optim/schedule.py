"""Schedules of learning rate and dropout, as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Self

from gptforge.config import Config


@dataclass(frozen=True)
class Schedule:
    """Linear warmup to `max_lr`, then the decay that `name` says; steps count from 0.

    - cosine: half a cosine down to `min_lr` (Loshchilov and Hutter, 2017), as in GPT-3.
    - linear: a straight line down to `min_lr`.
    - wsd: warmup, stable, decay. `max_lr` until the last `decay_fraction` of the steps, then down
      to `min_lr` as 1 - sqrt(progress), better than a straight line (Haegele et al., 2024,
      arXiv:2405.18392). What precedes the decay does not depend on `max_steps`, so a longer run
      can resume from there.
    - constant: `max_lr` to the end.
    """

    name: str
    max_lr: float
    min_lr: float
    warmup_steps: int
    max_steps: int
    decay_fraction: float = 0.2

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The schedule of a run."""
        return cls(
            config.schedule,
            max_lr=config.max_lr,
            min_lr=config.min_lr,
            warmup_steps=config.warmup_steps,
            max_steps=config.max_steps,
            decay_fraction=config.decay_fraction,
        )

    @property
    def decay_start(self) -> int:
        """The first step after the warmup, or after the stable part of wsd, at `max_lr`."""
        if self.name != "wsd":
            return self.warmup_steps
        decay_steps = max(1, round(self.decay_fraction * self.max_steps))
        return max(self.warmup_steps, self.max_steps - decay_steps)

    @property
    def stable_end(self) -> int | None:
        """For wsd, the step whose checkpoint a longer run resumes from; else None."""
        return self.decay_start if self.name == "wsd" else None

    def lr(self, step: int) -> float:
        """The learning rate of a step, from 0 to `max_steps`, where the decay ends."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        if self.name == "constant" or step < self.decay_start:
            return self.max_lr
        progress = (step - self.decay_start) / max(1, self.max_steps - self.decay_start)
        span = self.max_lr - self.min_lr
        if self.name == "cosine":
            # In this order of operations since version 0.1: runs are reproducible bit for bit.
            return self.min_lr + 0.5 * span * (1 + math.cos(math.pi * progress))
        # Subtracted from max_lr, to start with exactly that, as a longer wsd run does.
        return self.max_lr - span * (progress if self.name == "linear" else math.sqrt(progress))


def ramped_dropout(config: Config, step: int) -> float:
    """The dropout of a step, with a ramp: a small text is overfit late, when dropout is needed."""
    return config.dropout * min(1.0, step / (config.dropout_ramp * config.max_steps))
