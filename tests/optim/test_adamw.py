import copy

import pytest
import torch

from gptforge.config import Config
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.optim.adamw import AdamW, build_adamw


def build(model: GPT, lr: float = 0.01) -> AdamW:
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def test_only_matrices_and_embeddings_decay(tiny_model) -> None:
    optimizer = build(tiny_model)
    names = {parameter: name for name, parameter in tiny_model.named_parameters()}
    decays = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decays) == set(names.values())
    for name, decay in decays.items():
        is_vector = name.endswith("bias") or ".ln_" in name
        assert decay == (0.0 if is_vector else 0.1), name


def test_embeddings_may_decay_apart(tiny_model) -> None:
    for name in ("adamw", "muon"):
        config = Config(optimizer=name, embedding_weight_decay=3.0)
        optimizer = build_optimizer(config, tiny_model)
        names = {parameter: name for name, parameter in tiny_model.named_parameters()}
        decays = {names[p]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        assert set(decays) == set(names.values())
        decayed = {name for name, decay in decays.items() if decay == 3}
        assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_steps_match_the_papers_formula(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = build(model)
    weight = model.transformer["wpe"].weight
    expected = weight.detach().double()
    m = v = torch.zeros_like(expected)
    for step in range(1, 4):
        grad = torch.randn_like(weight)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight.grad = grad.clone()
        optimizer.step()
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.01 * 0.1)
        bias_corrected = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        expected = expected - 0.01 * bias_corrected
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_steps_equal_torchs_fused_adamw_bit_for_bit(tiny_model, device, found_inf) -> None:
    model = tiny_model.to(device)
    other = copy.deepcopy(model)
    optimizer = build(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    reference = torch.optim.AdamW(
        [
            {
                "params": [other.get_parameter(names[p]) for p in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in optimizer.param_groups
        ],
        lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    for step in range(3):
        for left, right in zip(model.parameters(), other.parameters(), strict=True):
            left.grad = torch.randn_like(left)
            right.grad = left.grad.clone()
        if found_inf is not None and step:
            optimizer.found_inf = torch.tensor(found_inf, device=device)
            reference.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()
        reference.step()
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)
        for key in optimizer.new_state(left):
            assert torch.equal(optimizer.state[left][key], reference.state[right][key]), key


def test_parameters_without_a_gradient_stay(tiny_model) -> None:
    optimizer = build(tiny_model)
    before = copy.deepcopy(tiny_model.state_dict())
    weight = tiny_model.transformer["wpe"].weight
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    changed = {
        name for name, t in tiny_model.state_dict().items() if not torch.equal(t, before[name])
    }
    assert changed == {"transformer.wpe.weight"}
