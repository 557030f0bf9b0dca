import hashlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from gptforge.checkpoint.state_dict import (
    load_model_state_dict,
    load_optimizer_state_dict,
    load_rng_state_dict,
    model_state_dict,
    optimizer_state_dict,
    rng_state_dict,
    save_safetensors,
)
from gptforge.errors import UserError
from gptforge.model import GPT
from gptforge.optim.adamw import AdamW, build_adamw
from gptforge.optim.optimizer import Optimizer
from tests.conftest import TINY


def trained(model: GPT) -> AdamW:
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    update(model, optimizer)
    return optimizer


def update(model: GPT, optimizer: Optimizer) -> None:
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
    load_model_state_dict(copy, model_state_dict(model), source="x")
    other = build_adamw(copy.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    load_optimizer_state_dict(copy, other, optimizer_state_dict(model, optimizer), source="x")
    update(model, optimizer)
    update(copy, other)
    for (name, left), right in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_what_an_optimizer_remembers_is_restored_in_its_place(tiny_model) -> None:
    optimizer = trained(tiny_model)
    saved = {k: v.clone() for k, v in optimizer_state_dict(tiny_model, optimizer).items()}
    update(tiny_model, optimizer)
    held = {
        f"{name}.{slot}": tensor
        for name, parameter in tiny_model.named_parameters()
        for slot, tensor in optimizer.state[parameter].items()
    }
    load_optimizer_state_dict(tiny_model, optimizer, saved, source="x")
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)


def test_the_tied_table_is_stored_once(tiny_model) -> None:
    names = model_state_dict(tiny_model).keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_saved_names_have_no_prefix_of_a_wrapper(tiny_model) -> None:
    plain = model_state_dict(tiny_model).keys()
    torch.compile(tiny_model)
    assert model_state_dict(tiny_model).keys() == plain
    assert all(name.startswith("transformer.") for name in plain)


@pytest.mark.parametrize("harm", ["missing", "stranger", "shape", "dtype"])
def test_what_does_not_fit_is_named(tiny_model, harm) -> None:
    tensors = model_state_dict(tiny_model)
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
        load_model_state_dict(tiny_model, tensors, source="somewhere")
    assert torch.equal(before, tiny_model.transformer["wpe"].weight)


def test_the_dice_fall_alike_after_restoring(device) -> None:
    state = rng_state_dict(device)
    first = torch.rand(5, device=device)
    load_rng_state_dict(state, device)
    assert torch.equal(first, torch.rand(5, device=device))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.uint8, torch.int64]),
)
def test_what_is_written_is_what_the_library_reads_and_would_write(tmp_path, shapes, dtype) -> None:
    tensors = {f"täst.{n}": (torch.rand(shape) * 200).to(dtype) for n, shape in enumerate(shapes)}
    path, other = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    size, digest = save_safetensors(path, tensors)
    assert size == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    save_file(tensors, other)
    for name, tensor in load_file(other).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_a_tensor_that_is_a_view_is_written_as_it_reads(tmp_path) -> None:
    view = torch.arange(12.0).view(3, 4).t()[1:]
    save_safetensors(tmp_path / "a.safetensors", {"a": view})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], view)
