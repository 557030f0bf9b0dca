"""The GELU's backward against autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.gelu import gelu_backward
from tests.kernels.helpers import bf16, rel_error

SHAPES = [(1, 8), (5, 32), (64, 48), (100, 384), (70, 768), (33, 1600), (3, 2049)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_backward_matches_autograd(device, rows, columns) -> None:
    torch.manual_seed(rows)
    x, dy = (bf16(rows, columns, device=device, scale=2) for _ in range(2))
    exact = x.double().requires_grad_()
    act = F.gelu(exact, approximate="tanh")
    act.backward(dy.double())
    bias_grad = torch.ones(columns, device=device)
    kept, same_x = gelu_backward(x, dy.clone(), bias_grad.clone(), recompute=False)
    assert same_x is x and torch.equal(x.double(), exact)
    dx, recomputed = gelu_backward(x, dy, bias_grad, recompute=True)
    assert dx is dy and recomputed is x
    assert rel_error(recomputed, act) < 5e-3
    assert rel_error(dx, exact.grad) < 1e-2
    assert torch.equal(kept, dx)
    assert rel_error(bias_grad - 1, dx.double().sum(0)) < 1e-3


def test_large_inputs_stay_finite(device) -> None:
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device).bfloat16()
    relu, ones, bias_grad = x.clamp(min=0), torch.ones_like(x), torch.zeros(5, device=device)
    dx, act = gelu_backward(x, ones, bias_grad, recompute=True)
    torch.testing.assert_close(act, relu)
    torch.testing.assert_close(dx.float(), torch.tensor([[0, 0, 0.5, 1, 1]], device=device))
