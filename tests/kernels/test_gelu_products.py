"""Both ways through the MLP's GELU against the plain formula in higher precision."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import gelu_products
from gptforge.kernels.gelu_products import (
    ByCublas,
    ByQuack,
    GeluProducts,
    prepare_quack,
    why_not_quack,
)

SHAPES = [
    # N, C, F
    (1024, 768, 3072),
    (515, 64, 256),
    (2048, 1600, 6400),
]


def apart() -> ByCublas:
    return ByCublas(slope_apart=True)


def in_the_product() -> ByCublas:
    return ByCublas(slope_apart=False)


@pytest.fixture(params=[apart, in_the_product, ByQuack])
def ways(request, device, tmp_path_factory) -> GeluProducts:
    if request.param is ByQuack:
        if reason := why_not_quack(torch.device(device), torch.bfloat16):
            pytest.skip(reason)
        prepare_quack(tmp_path_factory.getbasetemp())
    return request.param()


def random(*shape: int, device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(device, torch.bfloat16)


def near(ours: torch.Tensor, exact: torch.Tensor, error: float = 0.004) -> None:
    assert (ours.double() - exact).norm() <= error * exact.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_gives_what_goes_into_the_gelu_and_what_comes_out(ways, device, shape) -> None:
    N, C, F_ = shape  # noqa: N806
    torch.manual_seed(0)
    x, weight = random(N, C, device=device), random(F_, C, device=device, scale=C**-0.5)
    bias = random(F_, device=device)
    inner, activated = ways.forward(x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double()
    near(inner, exact)
    near(activated, F.gelu(exact, approximate="tanh"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("is_kept", [True, False])
def test_backward_takes_the_slope_and_adds_up_the_bias(ways, device, shape, is_kept) -> None:
    N, C, F_ = shape  # noqa: N806
    torch.manual_seed(0)
    upstream, inner = random(N, C, device=device), random(N, F_, device=device)
    weight = random(C, F_, device=device, scale=C**-0.5)
    before = torch.randn(F_).to(device)
    exact_inner = inner.double().requires_grad_()
    exact_activated = F.gelu(exact_inner, approximate="tanh")
    [exact] = torch.autograd.grad(exact_activated, exact_inner, upstream.double() @ weight.double())
    activated = exact_activated.detach().to(inner.dtype) if is_kept else None
    for _ in range(2):  # the second time with what the first one left behind
        sums = before.clone()
        wide, again = ways.backward(upstream, weight, inner.clone(), activated, sums)
        near(wide, exact)
        near(again, exact_activated.detach())
        # The sum is over rounded numbers.
        near(sums, before.double() + exact.sum(0), 0.01)


def test_quack_says_what_speaks_against_it(monkeypatch) -> None:
    assert "Hopper" in why_not_quack(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda")
    assert "bfloat16" in why_not_quack(cuda, torch.float16)
    monkeypatch.setattr(gelu_products.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in why_not_quack(cuda, torch.bfloat16)
    monkeypatch.setattr(gelu_products.importlib.util, "find_spec", lambda name: object())
    assert why_not_quack(cuda, torch.bfloat16) == ""
