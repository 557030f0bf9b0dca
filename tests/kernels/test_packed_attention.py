"""Attention over packed q, k and v, both ways, against autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.packed_attention import (
    ByFlash4,
    ByTorch,
    PackedAttention,
    prepare_flash4,
    why_not_flash4,
)


def ways(device: torch.device, size: int, folder) -> list[PackedAttention]:
    found: list[PackedAttention] = [ByTorch()]
    if not why_not_flash4(device, torch.bfloat16, head_size=size, dropout=0.0):
        prepare_flash4(folder)
        found.append(ByFlash4())
    return found


@pytest.mark.parametrize(("count", "length", "heads", "size"), [(3, 24, 4, 8), (2, 256, 3, 64)])
def test_values_gradients_and_column_sums_are_those_of_double_precision(
    count, length, heads, size, device, tmp_path
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
    for way in ways(device, size, tmp_path):
        sums = torch.ones(3 * heads * size, device=device)
        out, kept = way.forward(qkv)
        assert (out.double() - rows).norm() < 1e-2 * rows.norm()
        wide = way.backward(upstream, kept, sums)
        assert (wide.double() - gradient).norm() < 2e-2 * gradient.norm()
        torch.testing.assert_close(sums - 1, wide.float().sum(0), rtol=1e-4, atol=1e-3)


def test_flash4_says_what_speaks_against_it(monkeypatch) -> None:
    cuda = torch.device("cuda", 0)
    assert "Hopper" in why_not_flash4(torch.device("cpu"), torch.bfloat16, head_size=64, dropout=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper" in why_not_flash4(cuda, torch.bfloat16, head_size=64, dropout=0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype, size, dropout in [
        (torch.float16, 64, 0.0),
        (torch.bfloat16, 32, 0.0),
        (torch.bfloat16, 64, 0.1),
    ]:
        reason = why_not_flash4(cuda, dtype, head_size=size, dropout=dropout)
        assert "bfloat16, no dropout" in reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = why_not_flash4(cuda, torch.bfloat16, head_size=64, dropout=0)
    assert reason == "the package flash-attn-4 is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert why_not_flash4(cuda, torch.bfloat16, head_size=64, dropout=0) == ""
