"""Row sums against double precision."""

import pytest
import torch

from gptforge.kernels.reductions import (
    PendingReductions,
    accumulate_column_sums,
    accumulate_partials,
)
from tests.kernels.helpers import INTERPRETED, bf16, rel_error


@pytest.mark.parametrize(
    ("rows", "columns"), [(5, 32), (64, 48), (1000, 384), (70, 768), (33, 1600)]
)
def test_column_sums_are_added(device, rows, columns) -> None:
    torch.manual_seed(rows)
    x = bf16(rows, columns, device=device)
    before = torch.randn(columns, device=device)
    out = before.clone()
    accumulate_column_sums(x, out)
    assert rel_error(out - before, x.double().sum(0)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_deferred_sums_match_immediate_ones(device, count) -> None:
    """Of several sizes, some with more columns than are needed."""
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("torch sums at once on a CPU")
    torch.manual_seed(count)
    sizes = [(1, 8, 8), (700, 96, 64), (33, 1600, 1600), (513, 40, 7), (2, 33, 33)]
    pending, expected, deferred, repeated, immediate = PendingReductions(), [], [], [], []
    for rows, columns, out_columns in (sizes * 2)[:count]:
        partials = torch.randn(rows, columns, device=device)
        before = torch.randn(out_columns, device=device)
        expected.append(before.double() + partials.double().sum(0)[:out_columns])
        deferred.append((partials, before.clone()))
        repeated.append((partials, before.clone()))
        accumulate_partials(partials, deferred[-1][1], pending)
        assert torch.equal(deferred[-1][1], before)
        immediate.append(before)
        accumulate_partials(partials, before)
    pending.flush()
    pending.flush()
    for partials, out in repeated:
        accumulate_partials(partials, out, pending)
    pending.flush()
    for (_, a), (_, b), c, exact in zip(deferred, repeated, immediate, expected, strict=True):
        assert rel_error(a, exact) < 1e-5
        assert torch.equal(a, b), "the order of additions is fixed"
        assert rel_error(c, exact) < 1e-5
