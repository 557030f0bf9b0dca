import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.generate.sampling import Sampling, pick, throw_dice

SHARES = torch.tensor([0.3, 0.5, 0.05, 0.15])


def shares_drawn(sampling: Sampling, draws: int = 1000) -> list[float]:
    """How often each id is drawn by dice spread evenly: exact, but for the grid."""
    dice = (torch.arange(draws) + 0.5) / draws
    ids = pick(SHARES.log().expand(draws, 4), dice, sampling)
    return (torch.bincount(ids, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, 0, 1.0), [0.3, 0.5, 0.05, 0.15]),
        (Sampling(1.0, 2, 1.0), [0.375, 0.625, 0, 0]),
        (Sampling(1.0, 4, 0.9), [0.3 / 0.95, 0.5 / 0.95, 0, 0.15 / 0.95]),
        (Sampling(1.0, 0, 0.6), [0.375, 0.625, 0, 0]),
        (Sampling(1.0, 0, 0.4), [0, 1, 0, 0]),
        (Sampling(1.0, 0, 1e-12), [0, 1, 0, 0]),
        (Sampling(1.0, 1, 1.0), [0, 1, 0, 0]),
        (Sampling(0.5, 2, 1.0), [0.09 / 0.34, 0.25 / 0.34, 0, 0]),
        # Of what top-k leaves, 0.625 and 0.375, the first alone holds six tenths.
        (Sampling(1.0, 2, 0.6), [0, 1, 0, 0]),
        (Sampling(1e-40, 0, 1.0), [0, 1, 0, 0]),
        (Sampling(0, 0, 1.0), [0, 1, 0, 0]),
    ],
)
def test_draws_follow_the_probabilities_that_the_settings_leave(sampling, expected) -> None:
    assert shares_drawn(sampling) == pytest.approx(expected, abs=0.002)


@settings(deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=9),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.01, 5),
    st.integers(0, 12),
    st.floats(0.001, 1),
)
def test_one_of_the_k_likeliest_is_drawn_whatever_the_dice(logits, dice, heat, k, p) -> None:
    row = torch.tensor([logits])
    drawn = int(pick(row, torch.tensor([dice]), Sampling(heat, k, p)))
    better = sum(other > row[0, drawn] for other in row[0])
    assert better < (k or len(logits))


def test_dice_depend_on_their_own_seed_alone() -> None:
    both = throw_dice([7, 8], 40)
    assert torch.equal(throw_dice([8], 25)[0], both[1, :25])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(throw_dice([None], 40), throw_dice([None], 40))
    assert both.min() >= 0
    assert both.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed) -> None:
    with pytest.raises(UserError, match="--seed"):
        throw_dice([seed], 3)
