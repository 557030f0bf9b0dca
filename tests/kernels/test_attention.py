"""Attention by products against torch's own, in higher precision."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from gptforge.kernels.attention import MAX_MATMUL_TOKENS, causal_attention, matmul_attention


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3), H=st.integers(1, 4), T=st.integers(1, 70), D=st.sampled_from([8, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_values_and_gradients_are_those_of_double_precision(B, H, T, D, dtype) -> None:  # noqa: N803
    torch.manual_seed(T)
    packed = torch.randn(B, T, 3, H, D).to(dtype)
    upstream = torch.randn(B, H, T, D)
    ours, exact = packed.clone().requires_grad_(), packed.double().requires_grad_()
    y = matmul_attention(*ours.permute(2, 0, 3, 1, 4), 0.0)
    expected = F.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4), is_causal=True)
    y.backward(upstream.to(dtype))
    expected.backward(upstream.to(dtype).double())
    most = 1e-5 if dtype == torch.float32 else 2e-2
    assert (y.double() - expected).norm() <= most * expected.norm()
    assert (ours.grad.double() - exact.grad).norm() <= most * exact.grad.norm()


def test_under_autocast_the_scores_stay_narrow_and_dropout_drops() -> None:
    q = torch.randn(2, 2, 16, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_attention(q, q, q, 0.0)
        dropped = causal_attention(q, q, q, 0.5)
    assert y.dtype == dropped.dtype == torch.bfloat16
    assert not torch.equal(y, dropped)


@pytest.mark.parametrize("T", [MAX_MATMUL_TOKENS, MAX_MATMUL_TOKENS + 1])
def test_long_sequences_are_left_to_torch(T) -> None:  # noqa: N803
    q = torch.randn(1, 1, T, 8).bfloat16()
    torch_own = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(causal_attention(q, q, q, 0.0), torch_own) == (T > MAX_MATMUL_TOKENS)
