import copy

import pytest
import torch

from gptforge.config import Config
from gptforge.device import Precision
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.optim.muon import newton_schulz
from gptforge.optim.optimizer import Optimizer


def build(model: GPT, name: str = "muon") -> Optimizer:
    optimizer = build_optimizer(Config(optimizer=name), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    return optimizer


def matrices(model: GPT) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".h." in n and n.endswith("weight")
            and p.dim() == 2}  # fmt: skip


def random_grads(model: GPT, step: int) -> dict[str, torch.Tensor]:
    """The same gradients for a step each time, by the names of the parameters."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter.device)
        for name, parameter in model.named_parameters()
    }


def train(model: GPT, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        for name, grad in random_grads(model, step).items():
            model.get_parameter(name).grad = grad
        optimizer.step()


def test_matrices_match_torchs_muon_with_separate_q_k_v(tiny_model, device) -> None:
    model = tiny_model.to(device)
    start = copy.deepcopy(model)
    train(model, build(model), 3)
    split = {
        name: [torch.nn.Parameter(m.clone()) for m in parameter.detach().chunk(
            3 if "c_attn" in name else 1)]
        for name, parameter in matrices(start).items()
    }  # fmt: skip
    reference = torch.optim.Muon(
        [parameter for parameters in split.values() for parameter in parameters],
        lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    for step in range(3):
        grads = random_grads(start, step)
        for name, parameters in split.items():
            for parameter, grad in zip(parameters, grads[name].chunk(len(parameters)), strict=True):
                parameter.grad = grad.clone()
        reference.step()
    for name, parameters in split.items():
        expected = torch.cat([parameter.detach() for parameter in parameters])
        moved = (expected - start.get_parameter(name)).norm()
        # The iteration rounds to bfloat16 in another order.
        assert (model.get_parameter(name) - expected).norm() < 0.02 * moved, name


def test_matrices_may_have_their_own_rate_and_decay(tiny_model) -> None:
    other = copy.deepcopy(tiny_model)
    config = Config(optimizer="muon", max_lr=0.01, muon_lr=0.04, muon_weight_decay=0.3)
    separate = build_optimizer(config, tiny_model)
    common = build_optimizer(Config(optimizer="muon", weight_decay=0.3), other)
    separate.set_lr(0.01)
    common.set_lr(0.04)
    for model, optimizer in ((tiny_model, separate), (other, common)):
        train(model, optimizer, 3)
    expected = dict(matrices(other))
    for name, parameter in matrices(tiny_model).items():
        assert torch.equal(parameter, expected[name])
    assert separate.param_groups[1]["lr"] == 0.01


def test_other_parameters_match_adamw(tiny_model) -> None:
    other = copy.deepcopy(tiny_model)
    train(tiny_model, build(tiny_model), 3)
    train(other, build(other, "adamw"), 3)
    assert len(matrices(tiny_model)) == 8
    for name, value in tiny_model.named_parameters():
        is_equal = torch.equal(value, other.get_parameter(name))
        assert is_equal == (name not in matrices(tiny_model)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 16, 48), (2, 48, 16), (1, 32, 32)])
def test_newton_schulz_brings_singular_values_near_one(shape, dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = newton_schulz(x)
    assert found.dtype == dtype
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize(
    ("native", "dtype"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)],
)
def test_matmuls_are_in_bfloat16_only_where_it_is_native(
    tiny_model, monkeypatch, native, dtype
) -> None:
    precision = Precision(getattr(torch, native), "")
    monkeypatch.setattr("gptforge.optim.select_precision", lambda *_: precision)
    dtypes = []

    def record(x: torch.Tensor) -> torch.Tensor:
        dtypes.append(x.dtype)
        return newton_schulz(x)

    monkeypatch.setattr("gptforge.optim.muon.newton_schulz", record)
    train(tiny_model, build(tiny_model), 1)
    assert set(dtypes) == {dtype}


def test_step_that_is_not_finite_changes_nothing(tiny_model, device) -> None:
    model = tiny_model.to(device)
    optimizer = build(model)
    train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    states = {p: copy.deepcopy(optimizer.state[p]) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, state in states.items():
        assert set(state) == set(optimizer.new_state(parameter))
        for key, value in state.items():
            assert torch.equal(optimizer.state[parameter][key], value), key
