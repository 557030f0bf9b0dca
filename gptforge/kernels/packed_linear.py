"""A layer's product with weights that no longer change: on a CPU, laid out as oneDNN likes them.

`F.linear` reads a weight as it is stored. For the few rows of a step of writing, where a CPU does
little but fetch weights from memory, that reaches a third to a half of the memory's speed;
docs/log.md has the figures. oneDNN's own layout, made once, doubles it, and its products add the
bias, GELU or what the layer is added to on their way out. `torch.compile` uses the same operators
when it freezes a model.

Shapes: x (..., in), weight (out, in), bias (out,).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NUMEL = 2**18
"""Numbers in a weight from which the layout pays: smaller ones stay in the CPU's cache anyway."""
BATCH_SIZE_HINT = 8
"""Rows that the layout is made for; it serves fewer and more of them as well."""


class PackedLinear:
    """`F.linear`, and what usually follows it.

    Args:
        weight: used as it is, and seen to change, unless it is packed.
        bias: likewise.
        packed: make a copy in oneDNN's layout where there is one and it pays.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = False) -> None:
        self.weight, self.bias = weight, bias
        self.is_packed = pack and weight.numel() >= MIN_NUMEL and can_pack(weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_SIZE_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` through the layer."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def forward_gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        """`x` through the layer and GELU; `approximate` is torch's, tanh (GPT-2's) or none."""
        if not self.is_packed:
            return F.gelu(F.linear(x, self.weight, self.bias), approximate=approximate)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu", [], approximate
        )
        return y

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`other` plus `x` through the layer."""
        if not self.is_packed:
            return residual + F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.weight, self.bias, "add"
        )
        return y


def can_pack(weight: Tensor) -> bool:
    """Whether this torch, on this CPU, computes such products from packed weights, and rightly."""
    return weight.device.type == "cpu" and _packing_works(weight.dtype)


@functools.cache
def _packing_works(dtype: torch.dtype) -> bool:
    # These operators are torch's own affair: asked for an example before they are relied on.
    dice = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 64, generator=dice).to(dtype) for _ in range(2))
    weight = torch.randn(64, 64, generator=dice).to(dtype)
    plain, packed = PackedLinear(weight, weight[0]), PackedLinear(weight, weight[0])
    try:
        packed.weight = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_SIZE_HINT)
        packed.is_packed = True
        pairs = [
            (p(x), p.forward_gelu(x), p.forward_gelu(x, "none"), p.forward_add(x, other))
            for p in (plain, packed)
        ]
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    # Sums of 64 products: a few units of the last place apart, not more.
    near = 16 * torch.finfo(dtype).eps
    return all(torch.allclose(a, b, rtol=near, atol=16 * near) for a, b in zip(*pairs, strict=True))
