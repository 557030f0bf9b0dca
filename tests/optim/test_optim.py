import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptforge.optim.adamw import build_adamw
from gptforge.optim.schedule import warmup_cosine

SEED = {"max_lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 100, "max_steps": 500}


@pytest.mark.parametrize(
    ("step", "printed"),
    # From the seed's own log.
    [(0, "0.000010"), (10, "0.000110"), (90, "0.000910"), (100, "0.001000"), (110, "0.000999"),
     (120, "0.000994"), (150, "0.000966"), (200, "0.000868"), (240, "0.000754"), (250, "0.000722")],
)  # fmt: skip
def test_the_schedule_is_the_seeds(step, printed) -> None:
    assert f"{warmup_cosine(step, **SEED):.6f}" == printed


@given(st.integers(1, 2000), st.data())
def test_the_rate_rises_to_the_top_and_falls_to_the_floor(max_steps, data) -> None:
    warmup = data.draw(st.integers(0, max_steps))
    rates = [
        warmup_cosine(k, max_lr=2.0, min_lr=0.5, warmup_steps=warmup, max_steps=max_steps)
        for k in range(max_steps)
    ]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < max_steps:
        assert rates[warmup] == 2.0
    if warmup:
        assert math.isclose(rates[warmup - 1], 2.0)


def test_only_matrices_and_embeddings_decay(tiny_model) -> None:
    optimizer = build_adamw(tiny_model, betas=(0.9, 0.95), weight_decay=0.1)
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    decays = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        is_vector = name.endswith("bias") or ".ln_" in name
        assert decay == (0.0 if is_vector else 0.1), name


def test_updates_are_those_of_the_papers_formula(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = build_adamw(model, betas=(0.9, 0.95), weight_decay=0.1)
    weight = model.transformer["wpe"].weight
    expected = weight.detach().double()
    m = v = torch.zeros_like(expected)
    for step in range(1, 4):
        gradient = torch.randn_like(weight)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.01 * 0.1)
        bias_corrected = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 0.01 * bias_corrected
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_updates_are_bit_for_bit_those_of_torchs_fused_adamw(tiny_model, device, found_inf) -> None:
    ours = tiny_model.to(device)
    theirs = copy.deepcopy(ours)
    optimizer = build_adamw(ours, betas=(0.9, 0.95), weight_decay=0.1)
    names = {parameter: name for name, parameter in ours.named_parameters()}
    reference = torch.optim.AdamW(
        [
            {
                "params": [theirs.get_parameter(names[p]) for p in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in optimizer.param_groups
        ],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        if found_inf is not None and step:
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            reference.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()
        reference.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(left, right)
        for slot in optimizer.state_keys(left):
            assert torch.equal(optimizer.state[left][slot], reference.state[right][slot]), slot


def test_parameters_without_a_gradient_stay(tiny_model) -> None:
    optimizer = build_adamw(tiny_model, betas=(0.9, 0.95), weight_decay=0.1)
    before = copy.deepcopy(tiny_model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    weight = tiny_model.transformer["wpe"].weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    moved = {
        name for name, t in tiny_model.state_dict().items() if not torch.equal(t, before[name])
    }
    assert moved == {"transformer.wpe.weight"}
