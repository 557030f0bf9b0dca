import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptforge.errors import UserError
from gptforge.inference.sampling import SamplingParams, draw_uniforms, sample

PROBS = torch.tensor([0.3, 0.5, 0.05, 0.15])


def sampled_frequencies(params: SamplingParams, draws: int = 1000) -> list[float]:
    """How often each id is sampled with evenly spaced numbers: exact up to their spacing."""
    uniforms = (torch.arange(draws) + 0.5) / draws
    ids = sample(PROBS.log().expand(draws, 4), uniforms, params)
    return (torch.bincount(ids, minlength=4) / draws).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(1.0, 0, 1.0), [0.3, 0.5, 0.05, 0.15]),
        (SamplingParams(1.0, 2, 1.0), [0.375, 0.625, 0, 0]),
        (SamplingParams(1.0, 4, 0.9), [0.3 / 0.95, 0.5 / 0.95, 0, 0.15 / 0.95]),
        (SamplingParams(1.0, 0, 0.6), [0.375, 0.625, 0, 0]),
        (SamplingParams(1.0, 0, 0.4), [0, 1, 0, 0]),
        (SamplingParams(1.0, 0, 1e-12), [0, 1, 0, 0]),
        (SamplingParams(1.0, 1, 1.0), [0, 1, 0, 0]),
        (SamplingParams(0.5, 2, 1.0), [0.09 / 0.34, 0.25 / 0.34, 0, 0]),
        # Top-k leaves 0.625 and 0.375: the first alone has more than top_p.
        (SamplingParams(1.0, 2, 0.6), [0, 1, 0, 0]),
        (SamplingParams(1e-40, 0, 1.0), [0, 1, 0, 0]),
        (SamplingParams(1e-300, 0, 1.0), [0, 1, 0, 0]),  # 0 in float32
        (SamplingParams(0, 0, 1.0), [0, 1, 0, 0]),
    ],
)
def test_frequencies_follow_the_filtered_distribution(params, expected) -> None:
    assert sampled_frequencies(params) == pytest.approx(expected, abs=0.002)


@given(
    st.lists(st.floats(-50, 50), min_size=1, max_size=9),
    st.floats(0, 1, exclude_max=True, width=32),
    st.floats(0.01, 5),
    st.integers(0, 12),
    st.floats(0.001, 1),
)
def test_the_sample_is_among_the_top_k(logits, uniform, temperature, k, p) -> None:
    row = torch.tensor([logits])
    sampled = int(sample(row, torch.tensor([uniform]), SamplingParams(temperature, k, p)))
    better = sum(other > row[0, sampled] for other in row[0])
    assert better < (k or len(logits))


def test_draws_depend_only_on_their_seed() -> None:
    both = draw_uniforms([7, 8], 40)
    assert torch.equal(draw_uniforms([8], 25)[0], both[1, :25])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(draw_uniforms([None], 40), draw_uniforms([None], 40))
    assert both.min() >= 0
    assert both.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed) -> None:
    with pytest.raises(UserError, match="seed must be a whole number"):
        draw_uniforms([seed], 3)
