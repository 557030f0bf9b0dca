import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.config import Config
from gptforge.optim.schedule import decay_start, learning_rate, ramped_dropout, stable_end

BASELINE = Config(max_lr=1e-3, min_lr=1e-4, warmup_steps=100, max_steps=500)


def warmup_cosine(
    step: int, *, max_lr: float, min_lr: float, warmup_steps: int, max_steps: int
) -> float:
    """The only schedule of version 0.1, whose runs have to resume with the same losses."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (max_lr - min_lr) * (1 + math.cos(math.pi * progress))


@st.composite
def configs(draw, names=("cosine", "linear", "wsd", "constant")):
    max_steps = draw(st.integers(1, 300))
    max_lr = draw(st.floats(1e-6, 1.0))
    return Config(
        schedule=draw(st.sampled_from(names)),
        max_lr=max_lr,
        min_lr=max_lr * draw(st.floats(0, 1)),
        warmup_steps=draw(st.integers(0, max_steps)),
        max_steps=max_steps,
        decay_fraction=draw(st.floats(0.001, 1)),
    )


@pytest.mark.parametrize(
    ("step", "printed"),
    # From the log of the original project.
    [(0, "0.000010"), (10, "0.000110"), (90, "0.000910"), (100, "0.001000"), (110, "0.000999"),
     (120, "0.000994"), (150, "0.000966"), (200, "0.000868"), (240, "0.000754"), (250, "0.000722")],
)  # fmt: skip
def test_cosine_matches_the_original_project(step, printed) -> None:
    assert f"{learning_rate(BASELINE, step):.6f}" == printed


@given(configs(names=["cosine"]))
def test_cosine_equals_that_of_version_0_1_bit_for_bit(config) -> None:
    names = ("max_lr", "min_lr", "warmup_steps", "max_steps")
    fields = {name: getattr(config, name) for name in names}
    for step in range(config.max_steps):
        assert learning_rate(config, step) == warmup_cosine(step, **fields)


@given(configs())
def test_rate_rises_to_the_maximum_and_then_never_rises(config) -> None:
    warmup, high, low = config.warmup_steps, config.max_lr, config.min_lr
    rates = [learning_rate(config, step) for step in range(config.max_steps + 1)]
    assert rates[:warmup] == sorted(rates[:warmup])
    # Rounding: max_lr * 3 / 3 need not be max_lr, nor min_lr + (max_lr - min_lr).
    assert all(0 < rate <= high * (1 + 1e-12) for rate in rates[:warmup])
    after = rates[warmup:]
    assert all(low - 1e-12 * high <= rate <= high * (1 + 1e-12) for rate in after)
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after))
    assert math.isclose(rates[max(0, warmup - 1)], high)
    if warmup < config.max_steps:
        assert math.isclose(rates[warmup], high)
        end = high if config.schedule == "constant" else low
        assert math.isclose(rates[-1], end, abs_tol=1e-12 * high)


@given(configs(names=["cosine", "linear", "wsd"]))
def test_decay_is_continuous(config) -> None:
    start, end = decay_start(config), config.max_steps
    # The steepest decay is the first step of 1 - sqrt(progress).
    steps = max(1, end - start)
    most = (config.max_lr - config.min_lr) * max(2, math.sqrt(steps)) / steps
    for step in range(start, end):
        assert (
            learning_rate(config, step) - learning_rate(config, step + 1)
            <= most * (1 + 1e-9) + 1e-15
        )


@given(configs(names=["linear"]))
def test_linear_falls_by_the_same_amount_each_step(config) -> None:
    steps = range(config.warmup_steps, config.max_steps)
    fall = (config.max_lr - config.min_lr) / max(1, len(steps))
    for step in steps:
        drop = learning_rate(config, step) - learning_rate(config, step + 1)
        assert math.isclose(drop, fall, rel_tol=1e-6, abs_tol=1e-12)


@given(configs(names=["wsd"]), st.integers(0, 300))
def test_longer_wsd_has_the_same_rates_before_the_decay(config, more) -> None:
    longer = dataclasses.replace(config, max_steps=config.max_steps + more)
    assert stable_end(longer) >= stable_end(config) == decay_start(config)
    for step in range(stable_end(config) + 1):
        assert learning_rate(longer, step) == learning_rate(config, step)


def test_wsd_decays_as_one_minus_sqrt_in_the_last_fifth() -> None:
    config = Config(schedule="wsd", max_lr=1.0, min_lr=0.0, warmup_steps=10, max_steps=100)
    assert [learning_rate(config, step) for step in (9, 10, 50, 79, 80)] == [1.0] * 5
    assert [learning_rate(config, 80 + n) for n in (5, 20)] == [0.5, 0.0]
    assert stable_end(config) == 80
    assert stable_end(BASELINE) is None


def test_dropout_rises_from_zero_in_the_first_part_of_the_steps() -> None:
    config = Config(dropout=0.2, dropout_ramp=0.5, max_steps=100)
    dropouts = [ramped_dropout(config, step) for step in (0, 10, 25, 50, 99)]
    assert dropouts == pytest.approx([0, 0.04, 0.1, 0.2, 0.2])
