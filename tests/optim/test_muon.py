"""Muon against torch's own, matrix by matrix, and beside AdamW in one optimizer."""

import copy

import pytest
import torch

from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.optim.adamw import build_adamw
from gptforge.optim.muon import newton_schulz
from gptforge.optim.optimizer import Optimizer


def build(model: GPT) -> Optimizer:
    optimizer = build_optimizer("muon", model, betas=(0.9, 0.95), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


def matrices(model: GPT) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".h." in n and n.endswith("weight")
            and p.dim() == 2}  # fmt: skip


def learn(model: GPT, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        dice = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=dice)
            parameter.grad = noise.to(parameter.device)
        optimizer.step()


def test_matrices_move_as_by_torchs_muon_with_q_k_and_v_apart(tiny_model, device) -> None:
    ours = tiny_model.to(device)
    theirs = copy.deepcopy(ours)
    learn(ours, build(ours), 3)
    split = {
        name: [torch.nn.Parameter(part.clone()) for part in parameter.detach().clone().chunk(
            3 if "c_attn" in name else 1)]
        for name, parameter in matrices(theirs).items()
    }  # fmt: skip
    reference = torch.optim.Muon(
        [part for parts in split.values() for part in parts],
        lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        dice = torch.Generator().manual_seed(step)
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=dice).to(device)
            for part, piece in zip(split.get(name, []), noise.chunk(len(split.get(name, [1]))),
                                   strict=False):  # fmt: skip
                part.grad = piece.clone()
        reference.step()
    start = dict(theirs.named_parameters())
    for name, parts in split.items():
        expected = torch.cat([part.detach() for part in parts])
        moved = (expected - start[name]).norm()
        # The iteration rounds to bfloat16 in another order.
        assert (dict(ours.named_parameters())[name] - expected).norm() < 0.02 * moved, name


def test_what_is_no_matrix_of_a_block_moves_as_by_adamw(tiny_model) -> None:
    other = copy.deepcopy(tiny_model)
    learn(tiny_model, build(tiny_model), 3)
    adamw = build_adamw(other, betas=(0.9, 0.95), weight_decay=0.1)
    for group in adamw.param_groups:
        group["lr"] = 0.01
    learn(other, adamw, 3)
    own = matrices(tiny_model)
    assert len(own) == 8
    for (name, value), expected in zip(
        tiny_model.named_parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, expected) == (name not in own), name


@pytest.mark.parametrize("shape", [(2, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_singular_values_end_near_one(shape) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(x).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_an_update_that_is_not_finite_leaves_weights_and_momentum(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = build(model)
    learn(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, state in kept.items():
        assert set(state) == set(optimizer.state_keys(parameter))
        for slot, value in state.items():
            assert torch.equal(optimizer.state[parameter][slot], value), slot
