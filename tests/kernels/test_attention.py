"""Attention against autograd in double precision."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from gptforge.kernels.attention import (
    MAX_MATMUL_TOKENS,
    PackedAttention,
    SdpaAttention,
    TritonAttention,
    attention_backward,
    attention_forward,
    causal_attention,
    matmul_attention,
    select_attention,
)
from gptforge.kernels.dropout import DropoutRate, DropoutSeed, keep_mask
from tests.kernels.helpers import INTERPRETED, bf16, rel_error


@settings(max_examples=25)
@given(
    B=st.integers(1, 3), H=st.integers(1, 4), T=st.integers(1, 70), D=st.sampled_from([8, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_matmul_attention_matches_double_precision(B, H, T, D, dtype) -> None:  # noqa: N803
    torch.manual_seed(T)
    qkv = torch.randn(B, T, 3, H, D).to(dtype)
    dy = torch.randn(B, H, T, D).to(dtype)
    copy, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    y = matmul_attention(*copy.permute(2, 0, 3, 1, 4), 0.0)
    expected = F.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4), is_causal=True)
    y.backward(dy)
    expected.backward(dy.double())
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    assert rel_error(y, expected) <= tol
    assert rel_error(copy.grad, exact.grad) <= tol


def test_autocast_keeps_bfloat16_and_dropout_drops() -> None:
    q = torch.randn(2, 2, 16, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_attention(q, q, q, 0.0)
        dropped = causal_attention(q, q, q, 0.5)
    assert y.dtype == dropped.dtype == torch.bfloat16
    assert not torch.equal(y, dropped)


@pytest.mark.parametrize("T", [MAX_MATMUL_TOKENS, MAX_MATMUL_TOKENS + 1])
def test_long_sequences_use_sdpa(T) -> None:  # noqa: N803
    q = torch.randn(1, 1, T, 8).bfloat16()
    sdpa = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.equal(causal_attention(q, q, q, 0.0), sdpa) == (T > MAX_MATMUL_TOKENS)


def implementations(device: torch.device, head_size: int) -> list[PackedAttention]:
    selected = select_attention(device, torch.bfloat16, head_size=head_size)
    return [SdpaAttention(), *([selected] if isinstance(selected, TritonAttention) else [])]


def exact_attention(qkv: torch.Tensor, dropout: DropoutSeed | None) -> torch.Tensor:
    """Output (N, C) of attention over (B, T, 3, H, D), probabilities times the dropout mask."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    B, H, T, D = q.shape  # noqa: N806
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    probs = (q @ k.mT * D**-0.5).masked_fill(future, -torch.inf).softmax(-1)
    if dropout is not None:
        probs = probs * keep_mask(dropout, B * H * T, T).view(B, H, T, T) * dropout.scale
    return (probs @ v).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(3, 24, 4, 8), (2, 256, 3, 64), (3, 1, 1, 64), (2, 65, 2, 64), (1, 1000, 2, 32)],
)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_packed_attention_matches_autograd(B, T, H, D, p, device) -> None:  # noqa: N803
    torch.manual_seed(T)
    qkv, dy = bf16(B, T, 3, H, D, device=device), bf16(B * T, H * D, device=device)
    dropout = DropoutRate(p, device).draw_seeds(1)[0] if p else None
    exact = qkv.double().requires_grad_()
    expected = exact_attention(exact, dropout)
    expected.backward(dy.double())
    for attention in implementations(device, D):
        if dropout is not None and isinstance(attention, SdpaAttention):
            continue  # uses torch's own RNG
        bias_grad = torch.ones(3 * H * D, device=device)
        out, saved = attention.forward(qkv, dropout)
        assert rel_error(out, expected) < 1e-2
        grad_qkv = attention.backward(dy, saved, bias_grad)
        assert rel_error(grad_qkv, exact.grad.view(B * T, -1)) < 2e-2
        torch.testing.assert_close(bias_grad - 1, grad_qkv.float().sum(0), rtol=1e-4, atol=1e-3)


def test_triton_backward_is_deterministic(device) -> None:
    if len(implementations(device, 64)) == 1:
        pytest.skip("not for this device")
    qkv, dy = bf16(2, 300, 3, 4, 64, device=device), bf16(600, 256, device=device)
    _, saved = TritonAttention().forward(qkv, None)
    results = []
    for _ in range(2):
        bias_grad = torch.zeros(768, device=device)
        results.append((TritonAttention().backward(dy, saved, bias_grad), bias_grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_backward_is_selected_where_it_was_measured(monkeypatch) -> None:
    hopper, bfloat16 = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    args = {"head_size": 64}
    assert isinstance(select_attention(hopper, bfloat16, **args), TritonAttention)
    assert isinstance(select_attention(torch.device("cpu"), bfloat16, **args), SdpaAttention)
    assert isinstance(select_attention(hopper, torch.float16, **args), SdpaAttention)
    args["head_size"] = 80
    assert isinstance(select_attention(hopper, bfloat16, **args), SdpaAttention)
    args["head_size"] = 64
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert isinstance(select_attention(hopper, bfloat16, **args), SdpaAttention)


@pytest.mark.skipif(not INTERPRETED, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("T", [64, 130])
def test_interpreted_kernels_on_cpu(T, p) -> None:  # noqa: N803
    B, H, D = 2, 2, 32  # noqa: N806
    qkv = torch.randn(B, T, 3, H, D)
    exact = qkv.double().requires_grad_()
    dropout = DropoutRate(p, torch.device("cpu")).draw_seeds(1)[0] if p else None
    expected = exact_attention(exact, dropout)
    dy = torch.randn(B * T, H * D)
    expected.backward(dy.double())
    out, lse = attention_forward(qkv, dropout)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    grad_qkv, partials = attention_backward(qkv, out, lse, dy, dropout)
    torch.testing.assert_close(grad_qkv.double(), exact.grad, rtol=1e-4, atol=1e-5)
    bias_grad = exact.grad.sum((0, 1)).flatten()
    torch.testing.assert_close(partials.double().sum(0), bias_grad, rtol=1e-4, atol=1e-4)
