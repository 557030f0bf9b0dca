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


def trained_optimizer(model: GPT) -> AdamW:
    optimizer = build_adamw(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    train_step(model, optimizer)
    return optimizer


def train_step(model: GPT, optimizer: Optimizer) -> None:
    device = next(model.parameters()).device
    idx = torch.arange(16, device=device)[None]
    model(idx, idx.roll(1)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    optimizer.zero_grad()


def test_restored_model_and_optimizer_continue_bitwise_equal(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = trained_optimizer(model)
    copy = GPT(TINY).to(device)
    load_model_state_dict(copy, model_state_dict(model), source="x")
    other = build_adamw(copy.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    load_optimizer_state_dict(copy, other, optimizer_state_dict(model, optimizer), source="x")
    train_step(model, optimizer)
    train_step(copy, other)
    for (name, left), right in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_optimizer_state_is_restored_in_place(tiny_model) -> None:
    optimizer = trained_optimizer(tiny_model)
    saved = {k: v.clone() for k, v in optimizer_state_dict(tiny_model, optimizer).items()}
    train_step(tiny_model, optimizer)
    state = {
        f"{name}.{key}": tensor
        for name, parameter in tiny_model.named_parameters()
        for key, tensor in optimizer.state[parameter].items()
    }
    load_optimizer_state_dict(tiny_model, optimizer, saved, source="x")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_tied_embedding_is_stored_once(tiny_model) -> None:
    names = model_state_dict(tiny_model).keys()
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names


def test_saved_names_have_no_prefix_of_torch_compile(tiny_model) -> None:
    plain = model_state_dict(tiny_model).keys()
    torch.compile(tiny_model)
    assert model_state_dict(tiny_model).keys() == plain
    assert all(name.startswith("transformer.") for name in plain)


@pytest.mark.parametrize("problem", ["missing", "unknown", "shape", "dtype"])
def test_tensor_that_does_not_fit_is_named(tiny_model, problem) -> None:
    tensors = model_state_dict(tiny_model)
    name = "transformer.h.0.mlp.c_fc.bias"
    if problem == "missing":
        del tensors[name]
    elif problem == "unknown":
        name = "transformer.h.9.bias"
        tensors[name] = torch.zeros(1)
    elif problem == "shape":
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name].half()
    before = tiny_model.transformer["wpe"].weight.clone()
    with pytest.raises(UserError, match=name):
        load_model_state_dict(tiny_model, tensors, source="somewhere")
    assert torch.equal(before, tiny_model.transformer["wpe"].weight)


def test_restored_rng_draws_the_same_numbers(device) -> None:
    state = rng_state_dict(device)
    first = torch.rand(5, device=device)
    load_rng_state_dict(state, device)
    assert torch.equal(first, torch.rand(5, device=device))


@pytest.mark.parametrize(
    "state",
    [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), torch.zeros(5056, dtype=torch.uint8)],
)
def test_invalid_rng_state_is_refused_and_changes_nothing(state) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UserError, match="step-000002: 'cpu': not a random generator's state"):
        load_rng_state_dict({"cpu": state}, torch.device("cpu"), source="step-000002")
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.uint8, torch.int64]),
)
def test_safetensors_file_equals_that_of_the_library(tmp_path, shapes, dtype) -> None:
    tensors = {f"täst.{n}": (torch.rand(shape) * 200).to(dtype) for n, shape in enumerate(shapes)}
    path, expected = tmp_path / "ours.safetensors", tmp_path / "expected.safetensors"
    size, digest = save_safetensors(path, tensors)
    assert size == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    save_file(tensors, expected)
    for name, tensor in load_file(expected).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_view_is_saved_by_its_values(tmp_path) -> None:
    view = torch.arange(12.0).view(3, 4).t()[1:]
    save_safetensors(tmp_path / "a.safetensors", {"a": view})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], view)
