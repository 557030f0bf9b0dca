"""Prepacked linear layers against plain ones, and the fallback without oneDNN's operators."""

import pytest
import torch
import torch.nn.functional as F

from gptforge.kernels import packed_linear
from gptforge.kernels.packed_linear import PackedLinear, can_pack
from tests.kernels.helpers import rel_error

SIZE = 640
"""Large enough to be packed."""


def random_layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(SIZE, SIZE, generator=generator) / SIZE**0.5
    return weight.to(dtype), torch.randn(SIZE, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8, 70])
def test_packed_matches_plain(dtype, rows) -> None:
    weight, bias = random_layer(dtype)
    if not can_pack(weight):
        pytest.skip("this torch, or this CPU, has no packed linear layers")
    packed = PackedLinear(weight, bias, pack=True)
    assert packed.is_packed
    x, residual = torch.randn(2, 2, rows, SIZE).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    tol = 2e-6 if dtype == torch.float32 else 1e-2
    for y, expected in (
        (packed(x), exact),
        (packed.forward_gelu(x), F.gelu(exact, approximate="tanh")),
        (packed.forward_add(x, residual), exact + residual.double()),
        (PackedLinear(weight, pack=True)(x), exact - bias.double()),
    ):
        assert y.dtype == dtype
        assert rel_error(y, expected) <= tol


def test_unpacked_layers_share_their_weight() -> None:
    weight, bias = random_layer(torch.float32)
    plain, small = PackedLinear(weight, bias), PackedLinear(weight[:8], bias[:8], pack=True)
    assert not plain.is_packed
    assert not small.is_packed
    x = torch.randn(1, SIZE)
    before = plain(x)
    weight.zero_()
    assert not torch.equal(plain(x), before)
    assert torch.equal(small(x), bias[None, :8])


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_missing_or_wrong_operators_are_not_used(monkeypatch, fault) -> None:
    class BrokenOps:
        """As another torch, or another machine, might have them."""

        def _reorder_linear_weight(self, weight, rows):
            if fault == "missing":
                raise NotImplementedError("not for this backend")
            return weight.flip(0)

        class _linear_pointwise:  # noqa: N801
            def __new__(cls, x, weight, bias, *_):
                return F.linear(x, weight, bias)

            binary = staticmethod(lambda x, other, weight, bias, _: other + F.linear(x, weight))

    weight, bias = random_layer(torch.float32)
    expected = F.linear(weight, weight, bias)
    monkeypatch.setattr(packed_linear, "_packing_works", packed_linear._packing_works.__wrapped__)
    monkeypatch.setattr(torch.ops, "mkldnn", BrokenOps())
    layer = PackedLinear(weight, bias, pack=True)
    assert not layer.is_packed
    assert torch.equal(layer(weight), expected)
