"""Masks that follow from keys and places."""

import torch

from gptforge.kernels.dropout import ALL, Drop, apply, kept, throw

CPU = torch.device("cpu")


def test_as_many_are_dropped_as_asked_and_all_tensors_differ() -> None:
    torch.manual_seed(1)
    masks = torch.stack([kept(drop, 500, 400) for drop in throw(6, 0.2, CPU)]).flatten(1).double()
    # Five standard deviations of what fair dice do.
    assert (masks.mean(1) - 0.8).abs().max() < 5 * (0.16 / 200_000) ** 0.5
    others = torch.corrcoef(masks) - torch.eye(6)
    assert others.abs().max() < 5 / 200_000**0.5


def test_neighbours_in_a_mask_know_nothing_of_each_other() -> None:
    torch.manual_seed(2)
    [drop] = throw(1, 0.5, CPU)
    mask = kept(drop, 512, 512).double() * 2 - 1
    for right, down in ((1, 0), (0, 1), (1, 1), (2, 0), (0, 2), (64, 0), (0, 64)):
        together = (mask * mask.roll((down, right), (0, 1))).mean()
        assert abs(together) < 5 / 512, (right, down)
    assert (mask.mean(0).abs().max() < 6 / 512**0.5) and (mask.mean(1).abs().max() < 6 / 512**0.5)


def test_the_dice_are_torchs_so_that_a_seed_repeats_them() -> None:
    torch.manual_seed(3)
    first = throw(2, 0.1, CPU)
    second = throw(2, 0.1, CPU)
    torch.manual_seed(3)
    again = throw(2, 0.1, CPU)
    assert torch.equal(kept(first[1], 9, 9), kept(again[1], 9, 9))
    assert not torch.equal(kept(first[1], 9, 9), kept(second[1], 9, 9))
    assert throw(2, 0.0, CPU) == [] == throw(2, 1e-12, CPU)


def test_the_mean_stays_as_it_is() -> None:
    [drop] = throw(1, 0.3, CPU)
    x = torch.ones(300, 300)
    assert abs(apply(drop, x).mean() - 1) < 0.01
    assert apply(None, x) is x
    assert Drop(drop.keys, ALL // 2).factor == 2
