"""Cross-entropy with its gradient in place, alone and fused with the output layer."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.cross_entropy import cross_entropy_in_place, fused_linear_cross_entropy
from tests.kernels.helpers import INTERPRETED, rel_error


@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (64, 4096), (300, 5003), (257, 50304)])
def test_fused_linear_cross_entropy_matches_autograd(device, rows, columns, dtype, tol) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("for CPUs")
    if INTERPRETED and rows * columns > 2**20:
        pytest.skip("slow in the interpreter")
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 64, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(columns, 64, device=device) * 0.3).requires_grad_()
    targets = torch.randint(0, columns, (rows,), device=device)
    targets[::4] = -1
    loss = fused_linear_cross_entropy(hidden, weight, targets)
    (loss * 0.25).backward()

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logits = F.linear(exact_hidden, exact_weight)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (expected * 0.25).backward()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) / float(expected.detach()) - 1) < tol / 2
    assert rel_error(hidden.grad, exact_hidden.grad) < tol
    assert rel_error(weight.grad, exact_weight.grad) < tol
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("columns", [2, 7, 8, 65, 128, 777, 4096, 4097, 5000])
def test_logits_become_their_gradient(device, columns) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(40, columns, device=device) * 4
    exact = logits.double().requires_grad_()
    targets = torch.randint(0, columns, (40,), device=device)
    targets[7] = -1
    losses = cross_entropy_in_place(logits, targets, 0.25)
    expected = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    (expected.sum() * 0.25).backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert not logits[7].any()
    assert losses[7] == 0


def test_extreme_logits_stay_finite(device) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], device=device).bfloat16()
    losses = cross_entropy_in_place(logits, torch.tensor([0, 1], device=device))
    assert losses.isfinite().all()
    assert logits.isfinite().all()


def test_scale_multiplies_the_gradient(device) -> None:
    logits = torch.randn(6, 70, device=device).bfloat16()
    targets = torch.randint(0, 70, (6,), device=device)
    full, scaled = logits.clone(), logits.clone()
    losses = cross_entropy_in_place(full, targets)
    torch.testing.assert_close(cross_entropy_in_place(scaled, targets, 0.125), losses)
    # A power of two changes no digit.
    assert torch.equal(scaled.float() * 8, full.float())
