"""Sums over rows, made from parts: those of torch in double precision."""

import os

import pytest
import torch

from gptforge.kernels.reductions import (
    PendingReductions,
    accumulate_column_sums,
    accumulate_partials,
)
from tests.kernels.near import distance

SHAPES = [(5, 32), (64, 48), (1000, 384), (70, 768), (33, 1600)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_column_sums_are_added_to_what_is_there(place, rows, columns) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, columns, device=place).bfloat16()
    before = torch.randn(columns, device=place)
    sums = before.clone()
    accumulate_column_sums(x, sums)
    assert distance(sums - before, x.double().sum(0)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_sums_that_waited_are_those_made_at_once(place, count) -> None:
    """Of different sizes, some with more columns in their parts than are wanted."""
    if place == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there are no parts on a CPU, but where Triton interprets")
    torch.manual_seed(count)
    sizes = [(1, 8, 8), (700, 96, 64), (33, 1600, 1600), (513, 40, 7), (2, 33, 33)]
    unfinished, expected, waited, again, at_once = PendingReductions(), [], [], [], []
    for rows, columns, wanted in (sizes * 2)[:count]:
        parts, before = torch.randn(rows, columns, device=place), torch.randn(wanted, device=place)
        expected.append(before.double() + parts.double().sum(0)[:wanted])
        waited.append((parts, before.clone()))
        again.append((parts, before.clone()))
        accumulate_partials(parts, waited[-1][1], unfinished)
        assert torch.equal(waited[-1][1], before)
        at_once.append(before)
        accumulate_partials(parts, before)
    unfinished.flush()
    unfinished.flush()
    for parts, sums in again:
        accumulate_partials(parts, sums, unfinished)
    unfinished.flush()
    for (_, one), (_, same), alone, exact in zip(waited, again, at_once, expected, strict=True):
        assert distance(one, exact) < 1e-5
        assert torch.equal(one, same), "each time in the same order"
        assert distance(alone, exact) < 1e-5
