"""Products and what comes right behind them, against double precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import cublaslt, matmul
from gptforge.kernels.matmul import (
    accumulate_wgrad,
    linear,
    linear_dgrad,
    linear_dgrad_dgelu,
    linear_gelu,
)
from tests.kernels.near import distance

# Tokens, in, out; the last ones are odd, so that a library may decline them.
SHAPES = [(256, 64, 192), (1024, 768, 3072), (512, 48, 50304), (100, 37, 91)]
# A table of weights so small that sums in parts would be no larger than counters.
SHAPES += [(4096, 16, 16), (2048, 32, 128)]


@pytest.fixture(autouse=True)
def triton_where_it_is_used(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.importorskip("triton")


def factors(rows: int, inner: int, out: int, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    sizes = [(rows, inner), (out, inner), (out,), (rows, out)]
    scales = (1.0, inner**-0.5, 1.0, 1.0)
    return [
        (torch.randn(size, device=device) * scale).bfloat16()
        for size, scale in zip(sizes, scales, strict=True)
    ]


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_a_layer_and_its_way_back_are_the_products(rows, inner, out, device) -> None:
    x, weight, bias, upstream = factors(rows, inner, out, device)
    exact = x.double() @ weight.double().t()
    assert distance(linear(x, weight), exact) < 5e-3
    assert distance(linear(x, weight, bias), exact + bias.double()) < 5e-3
    assert distance(linear_dgrad(upstream, weight), upstream.double() @ weight.double()) < 5e-3


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_the_gelu_comes_with_what_it_was_made_of(rows, inner, out, device) -> None:
    x, weight, bias, _ = factors(rows, inner, out, device)
    before, after = linear_gelu(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert distance(before, exact) < 5e-3
    assert distance(after, F.gelu(exact, approximate="tanh")) < 5e-3


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_the_way_back_through_a_gelu_is_autograds(rows, inner, out, device) -> None:
    _, weight, _, upstream = factors(rows, inner, out, device)
    before = torch.randn(rows, inner, device=device).bfloat16()
    exact = before.double().requires_grad_()
    F.linear(F.gelu(exact, approximate="tanh"), weight.double()).backward(upstream.double())
    assert distance(linear_dgrad_dgelu(upstream, weight, before), exact.grad) < 5e-3


@pytest.mark.parametrize(("rows", "inner", "out"), SHAPES)
def test_a_weights_gradient_is_added_to_what_is_there(rows, inner, out, device) -> None:
    x, _, _, upstream = factors(rows, inner, out, device)
    gradient = torch.randn(out, inner, device=device)
    exact = gradient.double() + 2 * upstream.double().t() @ x.double()
    # The first of two tries kernels out, and leaves no trace of that.
    for _ in range(2):
        accumulate_wgrad(gradient, upstream, x)
    # A GPU never rounds the sums to the factors' type, torch's product on a CPU does.
    assert distance(gradient, exact) < (1e-4 if device.type == "cuda" else 5e-3)


def test_a_gradient_in_the_factors_own_type_is_added_up_in_it(device) -> None:
    x, _, _, upstream = (tensor.double() for tensor in factors(64, 48, 32, device))
    gradient = torch.randn(32, 48, device=device, dtype=torch.float64)
    exact = gradient + upstream.t() @ x
    accumulate_wgrad(gradient, upstream, x)
    assert torch.allclose(gradient, exact)


def test_a_second_call_writes_new_memory(device) -> None:
    x, weight, bias, _ = factors(256, 64, 192, device)
    first, kept = linear(x, weight, bias), linear(x, weight, bias).clone()
    second = linear(2 * x, weight, bias)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)


def test_on_a_gpu_the_library_is_used_and_tries_its_kernels_out(device) -> None:
    if device.type != "cuda":
        pytest.skip("there is no cuBLASLt on a CPU")
    matmul._cached_plan.cache_clear()
    x, weight, bias, _ = factors(1024, 768, 3072, device)
    plan = matmul._plan(x, weight, turned=(False, True), epilogue=cublaslt.EPILOGUE_BIAS)
    assert plan is not None and not plan._is_tried
    linear(x, weight, bias)
    assert plan._is_tried
    upstream, gradient = torch.ones(1024, 3072, device=device).bfloat16(), torch.zeros_like(weight)
    accumulate_wgrad(gradient.float(), upstream, x)
    plan = matmul._plan(upstream, x, turned=(True, False), adds=True)
    assert plan is not None and plan._is_tried


def test_a_kernel_without_its_workspace_computes_the_same(device) -> None:
    if device.type != "cuda":
        pytest.skip("there is no cuBLASLt on a CPU")
    x, weight, _, _ = factors(4096, 384, 1152, device)
    exact = x.double() @ weight.double().t()
    plan = cublaslt.MatmulPlan(device, x.shape, weight.shape, transpose=(False, True))
    for kernel in plan._kernels:
        out = torch.full((4096, 1152), torch.nan, device=device, dtype=torch.bfloat16)
        try:
            plan._run(kernel, x, weight, out)
        except RuntimeError:
            assert not kernel.workspace_bytes, "it was found for the workspace that it was given"
            continue
        assert distance(out, exact) < 5e-3


def test_where_results_must_repeat_the_clock_does_not_choose(device) -> None:
    if device.type != "cuda":
        pytest.skip("there is no cuBLASLt on a CPU")
    matmul._cached_plan.cache_clear()
    x, weight, bias, _ = factors(1024, 768, 3072, device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        linear(x, weight, bias)
        plan = matmul._plan(x, weight, turned=(False, True), epilogue=cublaslt.EPILOGUE_BIAS)
        assert plan is not None and plan._chosen is plan._kernels[0]
    finally:
        torch.use_deterministic_algorithms(before)
        matmul._cached_plan.cache_clear()


def test_without_the_library_torch_computes_it(device, monkeypatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("no such library")

    matmul._cached_plan.cache_clear()
    monkeypatch.setattr(cublaslt, "MatmulPlan", missing)
    x, weight, bias, _ = factors(256, 64, 192, device)
    exact = x.double() @ weight.double().t() + bias.double()
    assert distance(linear(x, weight, bias), exact) < 5e-3
    matmul._cached_plan.cache_clear()
