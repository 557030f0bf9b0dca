import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.optim.schedule import warmup_cosine

BASELINE = {"max_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "max_steps": 500}


@pytest.mark.parametrize(
    ("step", "printed"),
    # From the log of the original project.
    [(0, "0.000010"), (10, "0.000110"), (90, "0.000910"), (100, "0.001000"), (110, "0.000999"),
     (120, "0.000994"), (150, "0.000966"), (200, "0.000868"), (240, "0.000754"), (250, "0.000722")],
)  # fmt: skip
def test_warmup_cosine_matches_the_baseline(step, printed) -> None:
    assert f"{warmup_cosine(step, **BASELINE):.6f}" == printed


@given(st.integers(1, 2000), st.data())
def test_warmup_cosine_rises_then_falls(max_steps, data) -> None:
    warmup = data.draw(st.integers(0, max_steps))
    rates = [
        warmup_cosine(step, max_lr=2.0, min_lr=0.5, warmup_steps=warmup, max_steps=max_steps)
        for step in range(max_steps)
    ]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < max_steps:
        assert rates[warmup] == 2.0
    if warmup:
        assert math.isclose(rates[warmup - 1], 2.0)
