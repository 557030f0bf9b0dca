"""Attention over packed q, k and v, both ways, against autograd in double precision."""

import os

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import attention, dropout
from gptforge.kernels.attention import (
    PackedAttention,
    SdpaAttention,
    TritonAttention,
    select_attention,
)
from gptforge.kernels.dropout import draw_dropout_seeds


def ways(device: torch.device, size: int) -> list[PackedAttention]:
    found: list[PackedAttention] = [SdpaAttention()]
    if isinstance(
        select_attention(device, torch.bfloat16, head_size=size, dropout=0.0), TritonAttention
    ):
        found.append(TritonAttention())
    return found


@pytest.mark.parametrize(
    ("count", "length", "heads", "size"),
    [(3, 24, 4, 8), (2, 256, 3, 64), (3, 1, 1, 64), (2, 65, 2, 64), (1, 1000, 2, 32)],
)
def test_values_gradients_and_column_sums_are_those_of_double_precision(
    count, length, heads, size, device
) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
    torch.manual_seed(length)
    qkv = torch.randn(count, length, 3, heads, size, device=device).bfloat16()
    upstream = torch.randn(count * length, heads * size, device=device).bfloat16()
    exact = qkv.double().requires_grad_()
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = y.transpose(1, 2).reshape(count * length, -1)
    rows.backward(upstream.double())
    gradient = exact.grad.view(count * length, -1)
    for way in ways(device, size):
        sums = torch.ones(3 * heads * size, device=device)
        out, kept = way.forward(qkv, None)
        assert (out.double() - rows).norm() < 1e-2 * rows.norm()
        wide = way.backward(upstream, kept, sums)
        assert (wide.double() - gradient).norm() < 2e-2 * gradient.norm()
        torch.testing.assert_close(sums - 1, wide.float().sum(0), rtol=1e-4, atol=1e-3)


def dropped_attention(exact: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows (N, C) of attention over (B, T, 3, H, D) with shares (B, H, T, T) times a mask."""
    q, k, v = exact.permute(2, 0, 3, 1, 4)
    future = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    shares = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
    return (shares * mask @ v).transpose(1, 2).flatten(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("count", "length", "heads", "size"), [(2, 256, 3, 64), (2, 65, 2, 64), (1, 1000, 2, 32)]
)
def test_what_is_dropped_from_the_shares_follows_from_the_keys(
    count, length, heads, size, device
) -> None:
    if len(ways(device, size)) == 1:
        pytest.skip("there is none of our own for this device")
    torch.manual_seed(length)
    qkv = torch.randn(count, length, 3, heads, size, device=device).bfloat16()
    upstream = torch.randn(count * length, heads * size, device=device).bfloat16()
    [drop] = draw_dropout_seeds(1, 0.25, device)
    mask = dropout.keep_mask(drop, count * heads * length, length) * drop.scale
    exact = qkv.double().requires_grad_()
    rows = dropped_attention(exact, mask.view(count, heads, length, length).double())
    rows.backward(upstream.double())
    gradient = exact.grad.view(count * length, -1)
    sums = torch.zeros(3 * heads * size, device=device)
    out, kept = TritonAttention().forward(qkv, drop)
    assert (out.double() - rows).norm() < 1e-2 * rows.norm()
    wide = TritonAttention().backward(upstream, kept, sums)
    assert (wide.double() - gradient).norm() < 2e-2 * gradient.norm()
    torch.testing.assert_close(sums, wide.float().sum(0), rtol=1e-4, atol=1e-3)


def test_a_way_back_of_our_own_gives_the_same_bits_each_time(device) -> None:
    if len(ways(device, 64)) == 1:
        pytest.skip("there is none for this device")
    qkv = torch.randn(2, 300, 3, 4, 64, device=device).bfloat16()
    upstream = torch.randn(600, 256, device=device).bfloat16()
    _, kept = TritonAttention().forward(qkv, None)
    found = []
    for _ in range(2):
        sums = torch.zeros(768, device=device)
        found.append((TritonAttention().backward(upstream, kept, sums), sums))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_way_back_of_our_own_is_taken_where_it_was_measured(monkeypatch) -> None:
    hopper = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    what = {"head_size": 64, "dropout": 0.0}
    assert isinstance(select_attention(hopper, torch.bfloat16, **what), TritonAttention)
    assert isinstance(select_attention(torch.device("cpu"), torch.bfloat16, **what), SdpaAttention)
    assert isinstance(select_attention(hopper, torch.float16, **what), SdpaAttention)
    assert isinstance(
        select_attention(hopper, torch.bfloat16, **{**what, "head_size": 80}), SdpaAttention
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert isinstance(select_attention(hopper, torch.bfloat16, **what), SdpaAttention)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not INTERPRETED, reason="runs where Triton interprets")
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("length", [64, 130])
def test_without_a_gpu_the_kernels_compute_the_same(length, share) -> None:
    count, heads, size = 2, 2, 32
    qkv = torch.randn(count, length, 3, heads, size)
    exact = qkv.double().requires_grad_()
    drop = next(iter(draw_dropout_seeds(1, share, torch.device("cpu"))), None)
    mask = torch.ones(count, heads, length, length, dtype=torch.float64)
    if drop is not None:
        mask *= (
            dropout.keep_mask(drop, count * heads * length, length).view(mask.shape) * drop.scale
        )
    rows = dropped_attention(exact, mask)
    upstream = torch.randn(count * length, heads * size)
    rows.backward(upstream.double())
    out, lse = attention.attention_forward(qkv, drop)
    torch.testing.assert_close(out.double(), rows, rtol=1e-4, atol=1e-5)
    gradient, parts = attention.attention_backward(qkv, out, lse, upstream, drop)
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-4, atol=1e-5)
    expected = exact.grad.sum((0, 1)).flatten()
    torch.testing.assert_close(parts.double().sum(0), expected, rtol=1e-4, atol=1e-4)
