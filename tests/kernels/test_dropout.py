"""Masks that follow from keys and places."""

import pytest
import torch

from gptforge.kernels.dropout import (
    THRESHOLD_RANGE,
    DropoutSeed,
    apply_dropout,
    draw_dropout_seeds,
    keep_mask,
)

CPU = torch.device("cpu")


def test_as_many_are_dropped_as_asked_and_all_tensors_differ() -> None:
    torch.manual_seed(1)
    masks = (
        torch.stack([keep_mask(drop, 500, 400) for drop in draw_dropout_seeds(6, 0.2, CPU)])
        .flatten(1)
        .double()
    )
    # Five standard deviations of what fair dice do.
    assert (masks.mean(1) - 0.8).abs().max() < 5 * (0.16 / 200_000) ** 0.5
    others = torch.corrcoef(masks) - torch.eye(6)
    assert others.abs().max() < 5 / 200_000**0.5


def signs(rows: int, columns: int, share: float) -> torch.Tensor:
    """A mask's numbers, centred and of variance one."""
    [drop] = draw_dropout_seeds(1, share, CPU)
    return (keep_mask(drop, rows, columns).double() - (1 - share)) / (share * (1 - share)) ** 0.5


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(1024, 384), (512, 512)])
def test_a_mask_has_no_pattern(rows, columns, share) -> None:
    """Bounds are five standard deviations of what fair dice do, six for the worst of many."""
    torch.manual_seed(2)
    mask = signs(rows, columns, share)
    for down, right in ((0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (64, 0), (0, 64), (8, 8)):
        there = mask.roll((-down, -right), (0, 1))
        assert abs((mask * there).mean()) < 5 / mask.numel() ** 0.5, (down, right)
        # Four that lie in a rectangle share the words of two rows and two columns.
        corners = mask * mask.roll(-down - 1, 0) * mask.roll(-right - 1, 1)
        corners *= mask.roll((-down - 1, -right - 1), (0, 1))
        assert abs(corners.mean()) < 5 / mask.numel() ** 0.5, (down, right)
    assert mask.sum(1).abs().max() < 6 * columns**0.5
    assert mask.sum(0).abs().max() < 6 * rows**0.5
    for lines in (mask, mask.T):
        alike = lines @ lines.T / lines.size(1) ** 0.5
        alike.fill_diagonal_(0)
        # As random as it should be on the whole, and nowhere two lines that are one.
        assert abs(alike.var() * lines.size(0) / (lines.size(0) - 1) - 1) < 0.05
        assert alike.abs().max() < 12


def test_the_dice_are_torchs_so_that_a_seed_repeats_them() -> None:
    torch.manual_seed(3)
    first = draw_dropout_seeds(2, 0.1, CPU)
    second = draw_dropout_seeds(2, 0.1, CPU)
    torch.manual_seed(3)
    again = draw_dropout_seeds(2, 0.1, CPU)
    assert torch.equal(keep_mask(first[1], 9, 9), keep_mask(again[1], 9, 9))
    assert not torch.equal(keep_mask(first[1], 9, 9), keep_mask(second[1], 9, 9))
    assert draw_dropout_seeds(2, 0.0, CPU) == [] == draw_dropout_seeds(2, 1e-12, CPU)


def test_the_mean_stays_as_it_is() -> None:
    [drop] = draw_dropout_seeds(1, 0.3, CPU)
    x = torch.ones(300, 300)
    assert abs(apply_dropout(drop, x).mean() - 1) < 0.01
    assert apply_dropout(None, x) is x
    assert DropoutSeed(drop.seeds, THRESHOLD_RANGE // 2).scale == 2
