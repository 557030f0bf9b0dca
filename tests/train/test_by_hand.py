"""The gradients written out against autograd."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gptforge.config import GPTConfig
from gptforge.kernels.attention import TritonAttention, select_attention
from gptforge.kernels.dropout import apply_dropout, draw_dropout_seeds, keep_mask
from gptforge.model import GPT, IGNORE_INDEX
from gptforge.train.backends.cuda_graph import CudaGraphBackend
from gptforge.train.backends.manual import ManualBackend
from gptforge.train.savings import Savings

SHAPE = GPTConfig(
    block_size=24, vocab_size=71, n_layer=3, n_head=4, n_embd=32, mlp_ratio=4, dropout=0.0
)


def model_and_batch(device: torch.device) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = GPT(SHAPE).init_weights()
    for parameter in model.parameters():
        # Away from the zeros and ones that biases and norms begin with.
        parameter.data += 0.05 * torch.randn_like(parameter)
    idx, targets = torch.randint(0, 71, (2, 6, 16))
    targets[0, :5] = IGNORE_INDEX
    return model.to(device), idx.to(device), targets.to(device)


def worst(model: GPT, reference: GPT) -> tuple[float, str]:
    return max(
        (float((p.grad.double() - q.grad).norm() / q.grad.norm()), name)
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "savings", [Savings(), Savings(activation_checkpointing=True), Savings(loss_chunk=10)]
)
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_gradients_are_those_of_autograd_and_add_up(dtype, close, savings, device) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
    model, idx, targets = model_and_batch(device)
    reference = copy.deepcopy(model).double()
    expected = reference(idx, targets)
    (expected * 0.25).backward()
    if dtype == torch.float64:
        if device.type == "cuda":
            pytest.skip("the kernels sum in float32")
        model = model.double()
    by_hand = ManualBackend(model, dtype, savings=savings)
    by_hand.zero_grad()
    loss = by_hand(idx[:2], targets[:2], 0.25) + by_hand(idx[2:], targets[2:], 0.25)
    # The reference takes its logits to float32, as the loss does everywhere.
    torch.testing.assert_close(loss.double(), expected.detach().double(), rtol=close, atol=0)
    distance, name = worst(model, reference)
    # TF32 is let in where float32 meets a GPU's matrix units.
    limit = 1e-2 if device.type == "cuda" and dtype == torch.float32 else close
    assert distance < limit, name


def test_a_large_table_gets_its_gradient_row_by_row(device, monkeypatch) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
    model, idx, targets = model_and_batch(device)
    found = []
    for few in (0, 71):
        monkeypatch.setattr("gptforge.train.backends.manual.FEW_IDS", few)
        by_hand = ManualBackend(copy.deepcopy(model), torch.float32)
        by_hand.zero_grad()
        by_hand(idx, targets, 1.0)
        found.append(by_hand.model.transformer["wte"].weight.grad)
    # TF32 is let in where float32 meets a GPU's matrix units.
    limit = 1e-2 if device.type == "cuda" else 1e-5
    assert (found[0] - found[1]).norm() < limit * found[0].norm()


def test_a_new_update_begins_at_zero_and_with_the_weights_as_they_are(device) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")
    model, idx, targets = model_and_batch(device)
    by_hand = ManualBackend(model, torch.bfloat16)
    by_hand.zero_grad()
    by_hand(idx, targets, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    by_hand.zero_grad()
    loss = by_hand(idx, targets, 1.0)
    got = [p.grad.clone() for p in model.parameters()]
    fresh = ManualBackend(model, torch.bfloat16)
    fresh.zero_grad()
    torch.testing.assert_close(fresh(idx, targets, 1.0), loss)
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("is_ours", [False, True], ids=["torchs attention", "our attention"])
def test_what_is_dropped_on_the_way_there_is_dropped_on_the_way_back(
    is_ours, device, monkeypatch
) -> None:
    """With the same masks for both. torch's attention, whose masks are its own, drops nothing."""
    if device.type == "cuda":
        pytest.importorskip("triton")
    shape, dtype = dataclasses.replace(SHAPE, dropout=0.25), torch.float32
    if is_ours:
        shape, dtype = dataclasses.replace(shape, n_embd=128), torch.bfloat16
        if not isinstance(
            select_attention(device, dtype, head_size=32, dropout=0.25), TritonAttention
        ):
            pytest.skip("there is none of our own for this device")
    _, idx, targets = model_and_batch(device)
    model = GPT(shape).requires_grad_()
    model.init_weights(torch.Generator().manual_seed(0)).to(device)
    model.train()
    torch.manual_seed(5)
    drops = iter(draw_dropout_seeds(1 + 3 * SHAPE.n_layer, 0.25, device))

    def dropped(x: torch.Tensor, *_: object) -> torch.Tensor:
        return apply_dropout(next(drops), x.flatten(0, 1)).view_as(x)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: float) -> torch.Tensor:
        B, H, T, D = q.shape  # noqa: N806
        mask = keep_mask(drop := next(drops), B * H * T, T).view(B, H, T, T) * drop.scale
        if not is_ours:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        future = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        shares = (q @ k.mT * D**-0.5).masked_fill(future, -torch.inf).softmax(-1)
        return (shares * mask) @ v

    monkeypatch.setattr(F, "dropout", dropped)
    monkeypatch.setattr("gptforge.model.attend", attend)
    reference = copy.deepcopy(model)
    expected = reference(idx, targets)
    expected.backward()
    assert next(drops, None) is None
    monkeypatch.setattr(
        "gptforge.kernels.attention.attend",
        lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    torch.manual_seed(5)
    by_hand = ManualBackend(model, dtype)
    by_hand.zero_grad()
    # TF32 is let in where float32 meets a GPU's matrix units.
    close = 3e-2 if is_ours else 1e-2 if device.type == "cuda" else 1e-5
    torch.testing.assert_close(by_hand(idx, targets, 1.0), expected.detach(), rtol=close, atol=0)
    distance, name = worst(model, reference)
    assert distance < 2 * close, name


@pytest.mark.parametrize("longest", [1e-3, 1e3, float("inf")])
def test_clipping_is_that_of_torch(longest) -> None:
    model, idx, targets = model_and_batch(torch.device("cpu"))
    reference = copy.deepcopy(model)
    by_hand = ManualBackend(model, torch.float32)
    by_hand.zero_grad()
    by_hand(idx, targets, 1.0)
    reference(idx, targets).backward()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), longest)
    torch.testing.assert_close(by_hand.clip_grad_norm_(longest), expected)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


def test_a_recording_computes_what_it_recorded(device) -> None:
    if device.type == "cpu":
        pytest.skip("for GPUs")
    pytest.importorskip("triton")
    model, idx, targets = model_and_batch(device)
    by_hand = ManualBackend(model, torch.bfloat16)
    by_hand.zero_grad()
    expected = [by_hand(idx, targets, 0.5), by_hand(targets.clamp(0), idx, 0.5)]
    gradients = by_hand.grads.flat.clone()
    replay = CudaGraphBackend(by_hand)
    for _ in range(3):
        replay.zero_grad()
        losses = [replay(idx, targets, 0.5), replay(targets.clamp(0), idx, 0.5)]
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(by_hand.grads.flat, gradients, rtol=1e-3, atol=1e-4)


def test_a_recording_drops_other_numbers_each_time_and_the_same_from_the_same_dice(device) -> None:
    if device.type == "cpu":
        pytest.skip("for GPUs")
    pytest.importorskip("triton")
    # Heads of 32, so that attention drops by the keys as well where it is ours.
    shape = dataclasses.replace(SHAPE, n_embd=128, dropout=0.25)
    model = GPT(shape).init_weights(torch.Generator().manual_seed(0)).to(device)
    idx, targets = torch.randint(0, 71, (2, 6, 16), device=device)
    replay = CudaGraphBackend(ManualBackend(model, torch.bfloat16))

    def losses() -> list[float]:
        torch.manual_seed(11)
        found = []
        for _ in range(4):
            replay.zero_grad()
            found.append(float(replay(idx, targets, 1.0)))
        return found

    losses()  # the first one warms up, the second one is recorded
    first = losses()
    assert len(set(first)) == 4
    assert losses() == first
