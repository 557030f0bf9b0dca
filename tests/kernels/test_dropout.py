"""Dropout masks that follow from seeds."""

import pytest
import torch

from gptforge.kernels.dropout import (
    DropoutRate,
    DropoutSeed,
    apply_dropout,
    keep_mask,
)

CPU = torch.device("cpu")


def test_masks_drop_the_right_share_and_are_independent() -> None:
    torch.manual_seed(1)
    seeds = DropoutRate(0.2, CPU).draw_seeds(6)
    masks = torch.stack([keep_mask(seed, 500, 400) for seed in seeds]).flatten(1).double()
    # Five standard deviations of independent draws.
    assert (masks.mean(1) - 0.8).abs().max() < 5 * (0.16 / 200_000) ** 0.5
    correlation = torch.corrcoef(masks) - torch.eye(6)
    assert correlation.abs().max() < 5 / 200_000**0.5


def standardized_mask(rows: int, columns: int, p: float) -> torch.Tensor:
    """A mask with zero mean and unit variance."""
    [dropout] = DropoutRate(p, CPU).draw_seeds(1)
    return (keep_mask(dropout, rows, columns).double() - (1 - p)) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 384), (512, 512)])
def test_masks_have_no_pattern(rows, columns, p) -> None:
    """Bounds are five standard deviations of independent draws, six for the worst of many."""
    torch.manual_seed(2)
    mask = standardized_mask(rows, columns, p)
    for down, right in ((0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (64, 0), (0, 64), (8, 8)):
        shifted = mask.roll((-down, -right), (0, 1))
        assert abs((mask * shifted).mean()) < 5 / mask.numel() ** 0.5, (down, right)
        # The corners of a rectangle share the words of two rows and two columns.
        corners = mask * mask.roll(-down - 1, 0) * mask.roll(-right - 1, 1)
        corners *= mask.roll((-down - 1, -right - 1), (0, 1))
        assert abs(corners.mean()) < 5 / mask.numel() ** 0.5, (down, right)
    assert mask.sum(1).abs().max() < 6 * columns**0.5
    assert mask.sum(0).abs().max() < 6 * rows**0.5
    for lines in (mask, mask.T):
        similarity = lines @ lines.T / lines.size(1) ** 0.5
        similarity.fill_diagonal_(0)
        # Random overall, and no two lines alike.
        assert abs(similarity.var() * lines.size(0) / (lines.size(0) - 1) - 1) < 0.05
        assert similarity.abs().max() < 12


def test_seeds_come_from_torchs_generator() -> None:
    torch.manual_seed(3)
    first = DropoutRate(0.1, CPU).draw_seeds(2)
    second = DropoutRate(0.1, CPU).draw_seeds(2)
    torch.manual_seed(3)
    repeated = DropoutRate(0.1, CPU).draw_seeds(2)
    assert torch.equal(keep_mask(first[1], 9, 9), keep_mask(repeated[1], 9, 9))
    assert not torch.equal(keep_mask(first[1], 9, 9), keep_mask(second[1], 9, 9))


def test_the_mean_is_preserved() -> None:
    [dropout] = DropoutRate(0.3, CPU).draw_seeds(1)
    x = torch.ones(300, 300)
    assert abs(apply_dropout(dropout, x).mean() - 1) < 0.01
    assert apply_dropout(None, x) is x
    assert DropoutSeed(dropout.seeds, 0.5).scale == 2
