"""The fused output layer against plain torch in higher precision."""

import pytest
import torch

from gptforge.kernels import cross_entropy
from tests.kernels.near import distance


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (64, 4096), (300, 5003), (257, 50304)])
def test_loss_and_gradients_are_those_of_double_precision(
    place, rows, columns, dtype, close
) -> None:
    if place == "cuda" and dtype == torch.float32:
        pytest.skip("for CPUs")
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 64, device=place).to(dtype).requires_grad_()
    table = (torch.randn(columns, 64, device=place) * 0.3).requires_grad_()
    targets = torch.randint(0, columns, (rows,), device=place)
    targets[::4] = -1
    loss = cross_entropy.fused_linear_cross_entropy(hidden, table, targets, -1)
    (loss * 0.25).backward()

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_table = table.detach().double().requires_grad_()
    expected = cross_entropy.fused_linear_cross_entropy_reference(
        exact_hidden, exact_table, targets, -1
    )
    (expected * 0.25).backward()
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach()) / float(expected.detach()) - 1) < close / 2
    assert distance(hidden.grad, exact_hidden.grad) < close
    assert distance(table.grad, exact_table.grad) < close
    assert table.grad.dtype == torch.float32


def test_every_gradient_is_written_and_rows_without_a_target_have_none(place) -> None:
    logits = torch.randn(40, 777, device=place).bfloat16()
    before = logits.double().requires_grad_()
    targets = torch.randint(0, 777, (40,), device=place)
    targets[7] = -1
    losses = cross_entropy.cross_entropy_in_place(logits, targets, -1)
    expected = torch.nn.functional.cross_entropy(before, targets, ignore_index=-1, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits.double(), before.grad, rtol=1e-2, atol=1e-5)
    assert not logits[7].any()
    assert losses[7] == 0


def test_logits_of_any_size_stay_finite(place) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], device=place).bfloat16()
    losses = cross_entropy.cross_entropy_in_place(logits, torch.tensor([0, 1], device=place), -1)
    assert losses.isfinite().all()
    assert logits.isfinite().all()


def test_gradients_come_scaled_as_asked(place) -> None:
    logits = torch.randn(6, 70, device=place).bfloat16()
    targets = torch.randint(0, 70, (6,), device=place)
    whole, tenth = logits.clone(), logits.clone()
    losses = cross_entropy.cross_entropy_in_place(whole, targets, -1)
    torch.testing.assert_close(
        cross_entropy.cross_entropy_in_place(tenth, targets, -1, 0.125), losses
    )
    # A power of two changes no digit.
    assert torch.equal(tenth.float() * 8, whole.float())
