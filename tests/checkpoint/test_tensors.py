import pytest
import torch

from gptforge.checkpoint.tensors import (
    generator_tensors,
    load_generator_tensors,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw
from tests.conftest import TINY


def trained(model: GPT) -> torch.optim.AdamW:
    optimizer = build_adamw(model, betas=(0.9, 0.95), weight_decay=0.1)
    update(model, optimizer)
    return optimizer


def update(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    device = next(model.parameters()).device
    idx = torch.arange(16, device=device)[None]
    model(idx, idx.roll(1)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad()


def test_model_and_optimizer_go_on_from_their_tensors_bit_for_bit(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = trained(model)
    copy = GPT(TINY).to(device)
    load_model_tensors(copy, model_tensors(model), source="x")
    other = build_adamw(copy, betas=(0.9, 0.95), weight_decay=0.1)
    load_optimizer_tensors(copy, other, optimizer_tensors(model, optimizer), source="x")
    update(model, optimizer)
    update(copy, other)
    for (name, left), right in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_the_tied_table_is_stored_once(tiny_model) -> None:
    names = model_tensors(tiny_model).keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_saved_names_have_no_prefix_of_a_wrapper(tiny_model) -> None:
    plain = model_tensors(tiny_model).keys()
    torch.compile(tiny_model)
    assert model_tensors(tiny_model).keys() == plain
    assert all(name.startswith("transformer.") for name in plain)


@pytest.mark.parametrize("harm", ["missing", "stranger", "shape", "dtype"])
def test_what_does_not_fit_is_named(tiny_model, harm) -> None:
    tensors = model_tensors(tiny_model)
    name = "transformer.h.0.mlp.c_fc.bias"
    if harm == "missing":
        del tensors[name]
    elif harm == "stranger":
        name = "transformer.h.9.bias"
        tensors[name] = torch.zeros(1)
    elif harm == "shape":
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name].half()
    before = tiny_model.transformer["wpe"].weight.clone()
    with pytest.raises(UserError, match=name):
        load_model_tensors(tiny_model, tensors, source="somewhere")
    assert torch.equal(before, tiny_model.transformer["wpe"].weight)


def test_the_dice_fall_alike_after_restoring(device) -> None:
    state = generator_tensors(device)
    first = torch.rand(5, device=device)
    load_generator_tensors(state, device)
    assert torch.equal(first, torch.rand(5, device=device))
