"""Packed products against plain ones, and the ways back where they are not to be had."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import packed_linear
from gptforge.kernels.packed_linear import PackedLinear, can_pack

SIDE = 640
"""Large enough to be packed."""


def layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(1)
    weight = torch.randn(SIDE, SIDE, generator=dice) / SIDE**0.5
    return weight.to(dtype), torch.randn(SIDE, generator=dice).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
def test_a_packed_product_is_the_plain_one(dtype, rows) -> None:
    weight, bias = layer(dtype)
    if not can_pack(weight):
        pytest.skip("this torch, or this CPU, has no packed products")
    packed = PackedLinear(weight, bias, pack=True)
    assert packed.is_packed
    x, other = torch.randn(2, 2, rows, SIDE).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    gelu = F.gelu(exact, approximate="tanh")
    most = 2e-6 if dtype == torch.float32 else 1e-2
    for got, expected in (
        (packed(x), exact),
        (packed.forward_gelu(x), gelu),
        (packed.forward_add(x, other), exact + other.double()),
        (PackedLinear(weight, pack=True)(x), exact - bias.double()),
    ):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() <= most * expected.norm()


def test_what_is_not_packed_shares_its_weight_and_sees_it_change() -> None:
    weight, bias = layer(torch.float32)
    plain, small = PackedLinear(weight, bias), PackedLinear(weight[:8], bias[:8], pack=True)
    assert not plain.is_packed
    assert not small.is_packed
    x = torch.randn(1, SIDE)
    before = plain(x)
    weight.zero_()
    assert not torch.equal(plain(x), before)
    assert torch.equal(small(x), bias[None, :8])


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_operators_that_are_missing_or_wrong_are_done_without(monkeypatch, fault) -> None:
    class Broken:
        """As another torch, or another machine, might have them."""

        def _reorder_linear_weight(self, weight, rows):
            if fault == "missing":
                raise NotImplementedError("not for this backend")
            return weight.flip(0)

        class _linear_pointwise:  # noqa: N801
            def __new__(cls, x, weight, bias, *_):
                return F.linear(x, weight, bias)

            binary = staticmethod(lambda x, other, weight, bias, _: other + F.linear(x, weight))

    weight, bias = layer(torch.float32)
    expected = F.linear(weight, weight, bias)
    monkeypatch.setattr(packed_linear, "_packing_works", packed_linear._packing_works.__wrapped__)
    monkeypatch.setattr(torch.ops, "mkldnn", Broken())
    made = PackedLinear(weight, bias, pack=True)
    assert not made.is_packed
    assert torch.equal(made(weight), expected)
