"""Sampling from the top-k against sorting; on a CPU in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from gptforge.inference.sampling import SamplingParams, sample
from gptforge.kernels.sampling import MAX_TOP_K, sample_top_k, supports_sample_top_k
from tests.kernels.helpers import INTERPRETED

ROUNDING = 1e-5
"""Largest error of a cumulative probability."""


@pytest.fixture
def triton_device(device: torch.device) -> torch.device:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU or Triton's interpreter")
    return device


def fused_sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_k: int, top_p: float = 1.0
) -> Tensor:
    """Token ids, (B,), as a decode session samples them at step 1 of 3."""
    B, device = len(logits), logits.device  # noqa: N806
    # NaN where nothing is to be read, and -1 where nothing is to be written.
    all_uniforms = torch.full((B, 3), torch.nan, device=device)
    all_uniforms[:, 1] = uniforms
    ids = torch.full((B, 1), -1, device=device)
    token_ids = torch.full((B, 3, 2), -1, device=device)
    counters = torch.tensor([1, 7], device=device)
    sample_top_k(
        logits, all_uniforms, counters, ids=ids, token_ids=token_ids,
        temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    expected = torch.full_like(token_ids, -1)
    expected[:, 1, 0] = ids[:, 0]
    assert torch.equal(token_ids, expected)
    assert counters.tolist() == [2, 8]
    return ids[:, 0]


def assert_sampled_by_inversion(
    ids: Tensor,
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int,
    top_p: float = 1.0,
) -> None:
    """Each random number lies in its token's interval of the cumulative distribution.

    Tokens are ordered by logit, equal ones by id.
    """
    for token, row, uniform in zip(ids.tolist(), logits.double(), uniforms.tolist(), strict=True):
        values, order = row.sort(descending=True, stable=True)
        probs = ((values[:top_k] - values[0]) / temperature).softmax(0)
        cdf = probs.cumsum(0)
        kept = int(((cdf - probs) < top_p).sum())
        ranks = (order[:kept] == token).nonzero()
        assert len(ranks) == 1, f"token {token} is not in the top-k and top-p"
        rank = int(ranks)
        target = uniform * float(cdf[kept - 1])
        assert cdf[rank] - probs[rank] - ROUNDING <= target <= cdf[rank] + ROUNDING


def random_uniforms(rows: int, device: torch.device) -> Tensor:
    # From almost 0 to almost 1, whatever the number of rows.
    return ((torch.arange(rows) + torch.rand(rows)) / rows).to(device)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize(("columns", "top_k"), [(200, 3), (333, 32), (1500, 40), (700, 100)])
def test_samples_by_inversion(triton_device, columns, top_k, top_p) -> None:
    logits = (2 * torch.randn(4, columns)).to(triton_device)
    uniforms = random_uniforms(4, triton_device)
    for temperature in (0.5, 1.5):
        ids = fused_sample(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)
        assert_sampled_by_inversion(
            ids, logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p
        )


@pytest.mark.parametrize("top_k", [5, 33])
def test_equal_logits_are_taken_by_id(triton_device, top_k) -> None:
    logits = torch.randint(0, 4, (4, 150)).float().to(triton_device)
    logits[3] = 1.5  # all of them
    uniforms = random_uniforms(4, triton_device)
    for top_p in (1.0, 0.6):
        ids = fused_sample(logits, uniforms, top_k=top_k, top_p=top_p)
        assert_sampled_by_inversion(ids, logits, uniforms, top_k=top_k, top_p=top_p)


def test_top_1_is_the_first_largest_logit(triton_device) -> None:
    logits = torch.randn(4, 300)
    logits[1, [40, 41, 299]] = 9.0  # in one group and in another
    logits[2, 1:] = -torch.inf
    logits[3] = -3.0
    expected = [int(logits[0].argmax()), 40, 0, 0]
    for uniform in (0.0, 0.999):
        uniforms = torch.full((4,), uniform, device=triton_device)
        assert fused_sample(logits.to(triton_device), uniforms, top_k=1).tolist() == expected


@pytest.mark.parametrize("temperature", [1e-6, 1e-44])
def test_a_tiny_temperature_is_greedy(triton_device, temperature) -> None:
    logits = torch.randn(4, 300).to(triton_device)
    ids = fused_sample(logits, random_uniforms(4, triton_device), temperature=temperature, top_k=20)
    assert torch.equal(ids, logits.argmax(-1))


def test_a_tiny_top_p_keeps_the_largest_logit(triton_device) -> None:
    logits = torch.randn(4, 300).to(triton_device)
    ids = fused_sample(logits, random_uniforms(4, triton_device), top_k=20, top_p=1e-9)
    assert torch.equal(ids, logits.argmax(-1))


def test_tokens_without_probability_are_not_sampled(triton_device) -> None:
    """Fewer finite logits than k."""
    logits = torch.full((4, 100), -torch.inf)
    logits[:, [3, 17, 18, 64, 99]] = torch.randn(4, 5)
    logits, uniforms = logits.to(triton_device), random_uniforms(4, triton_device)
    uniforms[3] = 1 - 2**-24
    ids = fused_sample(logits, uniforms, top_k=50)
    assert_sampled_by_inversion(ids, logits, uniforms, top_k=50)
    assert set(ids.tolist()) <= {3, 17, 18, 64, 99}


def test_rows_need_not_be_contiguous(triton_device) -> None:
    """The padding of the vocabulary is not sampled."""
    padded = torch.randn(3, 320).to(triton_device)
    padded[:, 310:] = 99.0
    logits, uniforms = padded[:, :310], random_uniforms(3, triton_device)
    ids = fused_sample(logits, uniforms, top_k=8)
    assert_sampled_by_inversion(ids, logits, uniforms, top_k=8)


def test_other_devices_and_numbers_of_tokens_are_not_supported(device) -> None:
    is_cuda = device.type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else device
    assert supports_sample_top_k(device, 50257, 200) == is_cuda
    assert supports_sample_top_k(device, 50257, 1) == is_cuda
    for columns, top_k in [(50257, 0), (50257, MAX_TOP_K + 1), (65, 65), (65, 200), (2**20, 5)]:
        assert not supports_sample_top_k(device, columns, top_k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (50, 1.0), (200, 0.9), (512, 1.0)])
def test_agrees_with_sample_on_a_gpu(rows, top_k, top_p) -> None:
    device, draws, equal = torch.device("cuda"), 32, 0
    params = SamplingParams(0.8, top_k, top_p)
    for _ in range(draws):
        logits = 3 * torch.randn(rows, 50257, device=device)
        uniforms = torch.rand(rows, device=device)
        ids = fused_sample(logits, uniforms, temperature=0.8, top_k=top_k, top_p=top_p)
        assert_sampled_by_inversion(
            ids, logits, uniforms, temperature=0.8, top_k=top_k, top_p=top_p
        )
        equal += int((ids == sample(logits, uniforms, params)).sum())
    # All but draws at the edge of a token's interval.
    assert equal >= 0.95 * draws * rows
