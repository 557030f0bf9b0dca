import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.inference.sampling import SamplingParams, draw_uniforms, sample

SHARES = torch.tensor([0.3, 0.5, 0.05, 0.15])


def shares_drawn(sampling: SamplingParams, draws: int = 1000) -> list[float]:
    """How often each id is drawn by dice spread evenly: exact, but for the grid."""
    dice = (torch.arange(draws) + 0.5) / draws
    ids = sample(SHARES.log().expand(draws, 4), dice, sampling)
    return (torch.bincount(ids, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingParams(1.0, 0, 1.0), [0.3, 0.5, 0.05, 0.15]),
        (SamplingParams(1.0, 2, 1.0), [0.375, 0.625, 0, 0]),
        (SamplingParams(1.0, 4, 0.9), [0.3 / 0.95, 0.5 / 0.95, 0, 0.15 / 0.95]),
        (SamplingParams(1.0, 0, 0.6), [0.375, 0.625, 0, 0]),
        (SamplingParams(1.0, 0, 0.4), [0, 1, 0, 0]),
        (SamplingParams(1.0, 0, 1e-12), [0, 1, 0, 0]),
        (SamplingParams(1.0, 1, 1.0), [0, 1, 0, 0]),
        (SamplingParams(0.5, 2, 1.0), [0.09 / 0.34, 0.25 / 0.34, 0, 0]),
        # Of what top-k leaves, 0.625 and 0.375, the first alone holds six tenths.
        (SamplingParams(1.0, 2, 0.6), [0, 1, 0, 0]),
        (SamplingParams(1e-40, 0, 1.0), [0, 1, 0, 0]),
        (SamplingParams(0, 0, 1.0), [0, 1, 0, 0]),
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
    drawn = int(sample(row, torch.tensor([dice]), SamplingParams(heat, k, p)))
    better = sum(other > row[0, drawn] for other in row[0])
    assert better < (k or len(logits))


def test_dice_depend_on_their_own_seed_alone() -> None:
    both = draw_uniforms([7, 8], 40)
    assert torch.equal(draw_uniforms([8], 25)[0], both[1, :25])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(draw_uniforms([None], 40), draw_uniforms([None], 40))
    assert both.min() >= 0
    assert both.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed) -> None:
    with pytest.raises(UserError, match="--seed"):
        draw_uniforms([seed], 3)
