"""The distillation loss with its gradient in place."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.distillation import MAX_VOCAB, distillation_in_place
from gptforge.kernels.launch import uses_triton


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("columns", [2, 65, 128, 777, MAX_VOCAB])
def test_logits_become_their_gradient(device, columns, count) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(37, columns, device=device) * 4
    teacher_logits = torch.randn(count, 37, columns, device=device) * 4
    targets = torch.randint(0, columns, (37,), device=device)
    targets[7] = -1
    exact, probs = logits.double().requires_grad_(), teacher_logits.double().softmax(-1).mean(0)
    expected = F.cross_entropy(exact, targets, ignore_index=-1, reduction="none")
    soft = F.cross_entropy(exact, probs, reduction="none") * (targets != -1)
    (0.25 * (0.7 * expected + 0.3 * soft).sum()).backward()
    losses = distillation_in_place(logits, teacher_logits, targets, weight=0.3, scale=0.25)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert not logits[7].any()
    assert losses[7] == 0


def test_bfloat16_is_rounded_once(device) -> None:
    logits, teacher_logits = torch.randn(3, 64, 128, device=device).bfloat16().split([1, 2])
    logits, targets = logits[0], torch.randint(0, 128, (64,), device=device)
    exact = logits.float()
    scale = torch.full((), 0.125, device=device)  # as in a CUDA graph
    losses = distillation_in_place(exact, teacher_logits.float(), targets, weight=0.5)
    rounded = distillation_in_place(logits, teacher_logits, targets, weight=0.5, scale=scale)
    torch.testing.assert_close(rounded, losses)
    torch.testing.assert_close(logits, (exact * 0.125).bfloat16(), rtol=2**-7, atol=1e-6)


def test_weight_0_is_the_plain_cross_entropy(device) -> None:
    logits, plain = torch.randn(2, 40, 65, device=device).unbind()
    plain.copy_(logits)
    targets = torch.randint(0, 65, (40,), device=device)
    losses = distillation_in_place(logits, torch.randn_like(logits)[None], targets, weight=0.0)
    expected = cross_entropy_in_place(plain, targets)
    rtol = 1e-5 if uses_triton(logits) else 0
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(logits, plain, rtol=rtol, atol=rtol)
