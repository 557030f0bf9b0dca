"""GEMMs and their epilogues, against double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import cublaslt, matmul
from gptforge.kernels.cublaslt import Epilogue
from gptforge.kernels.matmul import (
    accumulate_wgrad,
    linear,
    linear_dgrad,
    linear_dgrad_dgelu,
    linear_gelu,
    linear_gelu_backward,
)
from tests.kernels.helpers import bf16, rel_error

# Tokens, in, out; the last one is odd, so that cuBLASLt may decline it.
SHAPES = [(256, 64, 192), (1024, 768, 3072), (512, 48, 50304), (100, 37, 91)]
# Weights so small that split-K partial sums would be no larger than counters.
SHAPES += [(4096, 16, 16), (2048, 32, 128)]
# N, C, d_ff
MLP_SHAPES = [(1024, 768, 3072), (515, 64, 256), (2048, 1600, 6400)]


def skip_large_on_cpu(device: torch.device, numel: int) -> None:
    if device.type == "cpu" and numel > 2**28:
        pytest.skip("slow on a CPU, where torch computes it")


def random_layer(
    rows: int, inputs: int, outputs: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, bias and grad_output."""
    skip_large_on_cpu(device, rows * inputs * outputs)
    torch.manual_seed(rows)
    return (
        bf16(rows, inputs, device=device),
        bf16(outputs, inputs, device=device, scale=inputs**-0.5),
        bf16(outputs, device=device),
        bf16(rows, outputs, device=device),
    )


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_linear_forward_and_dgrad(rows, inputs, outputs, device) -> None:
    x, weight, bias, dy = random_layer(rows, inputs, outputs, device)
    exact = x.double() @ weight.double().t()
    assert rel_error(linear(x, weight), exact) < 5e-3
    assert rel_error(linear(x, weight, bias), exact + bias.double()) < 5e-3
    assert rel_error(linear_dgrad(dy, weight), dy.double() @ weight.double()) < 5e-3


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [*SHAPES, *MLP_SHAPES[1:]])
def test_linear_gelu_returns_its_input_too(rows, inputs, outputs, device) -> None:
    x, weight, bias, _ = random_layer(rows, inputs, outputs, device)
    pre_act, act = linear_gelu(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert rel_error(pre_act, exact) < 5e-3
    assert rel_error(act, F.gelu(exact, approximate="tanh")) < 5e-3


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_dgrad_through_the_gelu_matches_autograd(rows, inputs, outputs, device) -> None:
    _, weight, _, dy = random_layer(rows, inputs, outputs, device)
    pre_act = bf16(rows, inputs, device=device)
    exact = pre_act.double().requires_grad_()
    F.linear(F.gelu(exact, approximate="tanh"), weight.double()).backward(dy.double())
    assert rel_error(linear_dgrad_dgelu(dy, weight, pre_act), exact.grad) < 5e-3


@pytest.mark.parametrize("separate_dgelu", [True, False])
@pytest.mark.parametrize("shape", MLP_SHAPES, ids=str)
@pytest.mark.parametrize("saves_act", [True, False])
def test_linear_gelu_backward(separate_dgelu, device, shape, saves_act) -> None:
    N, C, d_ff = shape  # noqa: N806
    skip_large_on_cpu(device, N * C * d_ff)
    torch.manual_seed(0)
    dy, pre_act = bf16(N, C, device=device), bf16(N, d_ff, device=device)
    weight = bf16(C, d_ff, device=device, scale=C**-0.5)
    before = torch.randn(d_ff).to(device)
    exact_pre_act = pre_act.double().requires_grad_()
    exact_act = F.gelu(exact_pre_act, approximate="tanh")
    [exact] = torch.autograd.grad(exact_act, exact_pre_act, dy.double() @ weight.double())
    saved = exact_act.detach().to(pre_act.dtype) if saves_act else None
    bias_grad = before.clone()
    grad, act = linear_gelu_backward(
        dy, weight, pre_act, saved, bias_grad, separate_dgelu=separate_dgelu
    )
    assert rel_error(grad, exact) < 5e-3
    assert rel_error(act, exact_act) < 5e-3
    # The sum is over rounded gradients.
    assert rel_error(bias_grad, before.double() + exact.sum(0)) < 0.01


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_wgrad_accumulates(rows, inputs, outputs, device) -> None:
    x, _, _, dy = random_layer(rows, inputs, outputs, device)
    weight_grad = torch.randn(outputs, inputs, device=device)
    exact = weight_grad.double() + 2 * dy.double().t() @ x.double()
    # The first of two calls autotunes, which must leave no trace.
    for _ in range(2):
        accumulate_wgrad(weight_grad, dy, x)
    # A GPU never rounds the sums to bfloat16, torch's matmul on a CPU does.
    assert rel_error(weight_grad, exact) < (1e-4 if device.type == "cuda" else 5e-3)


def test_wgrad_in_double_precision(device) -> None:
    x, _, _, dy = (tensor.double() for tensor in random_layer(64, 48, 32, device))
    weight_grad = torch.randn(32, 48, device=device, dtype=torch.float64)
    exact = weight_grad + dy.t() @ x
    accumulate_wgrad(weight_grad, dy, x)
    assert torch.allclose(weight_grad, exact)


def test_each_call_returns_a_new_tensor(device) -> None:
    x, weight, bias, _ = random_layer(256, 64, 192, device)
    first, copy = linear(x, weight, bias), linear(x, weight, bias).clone()
    second = linear(2 * x, weight, bias)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("cuBLASLt needs a GPU")
    matmul._cached_plan.cache_clear()
    return device


def test_first_call_autotunes(gpu) -> None:
    x, weight, bias, _ = random_layer(1024, 768, 3072, gpu)
    plan = matmul.find_plan(x, weight, transpose=(False, True), epilogue=Epilogue.BIAS)
    assert plan is not None and not plan._is_tuned
    linear(x, weight, bias)
    assert plan._is_tuned
    dy, weight_grad = torch.ones(1024, 3072, device=gpu).bfloat16(), torch.zeros_like(weight)
    accumulate_wgrad(weight_grad.float(), dy, x)
    plan = matmul.find_plan(dy, x, transpose=(True, False), accumulate=True)
    assert plan is not None and plan._is_tuned


def test_each_candidate_is_correct(gpu) -> None:
    x, weight, _, _ = random_layer(4096, 448, 1344, gpu)
    exact = x.double() @ weight.double().t()
    plan = cublaslt.MatmulPlan(gpu, x.shape, weight.shape, transpose=(False, True))
    for candidate in plan._candidates:
        out = torch.full((4096, 1344), torch.nan, device=gpu, dtype=torch.bfloat16)
        plan._run(candidate, x, weight, out)
        assert rel_error(out, exact) < 5e-3


def test_deterministic_runs_do_not_autotune(gpu) -> None:
    x, weight, bias, _ = random_layer(1024, 768, 3072, gpu)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        linear(x, weight, bias)
        plan = matmul.find_plan(x, weight, transpose=(False, True), epilogue=Epilogue.BIAS)
        assert plan is not None and plan._best is plan._candidates[0]
    finally:
        torch.use_deterministic_algorithms(before)
        matmul._cached_plan.cache_clear()


def test_falls_back_to_torch_without_the_library(device, monkeypatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("no such library")

    matmul._cached_plan.cache_clear()
    monkeypatch.setattr(cublaslt, "MatmulPlan", missing)
    x, weight, bias, _ = random_layer(256, 64, 192, device)
    exact = x.double() @ weight.double().t() + bias.double()
    assert rel_error(linear(x, weight, bias), exact) < 5e-3
    matmul._cached_plan.cache_clear()
