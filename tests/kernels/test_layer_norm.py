"""LayerNorm with its residual addition, against autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.dropout import DropoutRate, keep_mask
from gptforge.kernels.layer_norm import add_layer_norm, layer_norm_backward
from tests.kernels.helpers import bf16, rel_error

SHAPES = [(5, 32), (64, 48), (100, 384), (70, 768), (33, 1600), (3, 2049)]


@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_forward_normalizes_the_sum(device, rows, columns, has_x) -> None:
    torch.manual_seed(rows)
    residual = bf16(rows, columns, device=device)
    x = bf16(rows, columns, device=device) if has_x else None
    weight, bias = (torch.randn(columns, device=device) for _ in range(2))
    total = residual.double() if x is None else residual.double() + x.double()
    out, saved = add_layer_norm(residual, x, weight, bias)
    assert rel_error(out, F.layer_norm(total, (columns,), weight.double(), bias.double())) < 1e-2
    assert rel_error(saved.residual, total) < 5e-3
    assert out.dtype == saved.residual.dtype == torch.bfloat16
    assert saved.residual is (residual if x is None else x)


@pytest.mark.parametrize("has_grad_residual", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_backward_matches_autograd(device, rows, columns, has_grad_residual) -> None:
    torch.manual_seed(rows)
    residual, dy, grad_residual = (bf16(rows, columns, device=device) for _ in range(3))
    weight, bias = (torch.randn(columns, device=device) for _ in range(2))
    _, saved = add_layer_norm(residual, None, weight, bias)
    exact = [x.double().requires_grad_() for x in (residual, weight, bias)]
    F.layer_norm(exact[0], (columns,), *exact[1:]).backward(dy.double())
    expected = exact[0].grad + grad_residual.double() if has_grad_residual else exact[0].grad

    before = torch.randn(3 * columns, device=device)
    grads = before.clone()
    dx, grad_x = layer_norm_backward(
        dy, saved, weight, grad_residual if has_grad_residual else None, grads
    )
    added = (grads - before).split(columns)
    assert dx is dy and grad_x is dy
    assert rel_error(dx, expected) < 1e-2
    assert rel_error(added[0], exact[1].grad) < 1e-3
    assert rel_error(added[1], exact[2].grad) < 1e-3
    assert rel_error(added[2], dx.double().sum(0)) < 1e-3
    # Without a bias before.
    fewer = torch.zeros(2 * columns, device=device)
    layer_norm_backward(bf16(rows, columns, device=device), saved, weight, None, fewer)
    assert fewer.all()


@pytest.mark.parametrize("has_x", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_backward_drops_what_the_forward_dropped(device, rows, columns, has_x) -> None:
    torch.manual_seed(rows)
    residual, dy, grad_residual = (bf16(rows, columns, device=device) for _ in range(3))
    x = bf16(rows, columns, device=device) if has_x else None
    weight, bias = (torch.randn(columns, device=device) for _ in range(2))
    [dropout] = DropoutRate(0.25, device).draw_seeds(1)
    mask = keep_mask(dropout, rows, columns)
    total = residual.double()
    if x is not None:
        total += x.double() * mask / 0.75
    _, saved = add_layer_norm(residual, x, weight, bias, dropout)
    assert rel_error(saved.residual, total) < 5e-3

    grads = torch.zeros(3 * columns, device=device)
    without_dropout = saved._replace(dropout=None)
    expected, _ = layer_norm_backward(dy.clone(), without_dropout, weight, grad_residual, grads)
    grads.zero_()
    dx, grad_x = layer_norm_backward(dy, saved, weight, grad_residual, grads)
    torch.testing.assert_close(dx, expected)
    torch.testing.assert_close(grad_x, (dx.float() * mask / 0.75).bfloat16())
    assert rel_error(grads[2 * columns :], grad_x.double().sum(0)) < 1e-3
