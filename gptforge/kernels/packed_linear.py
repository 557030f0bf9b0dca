"""Linear layers with frozen weights, on a CPU prepacked into oneDNN's blocked layout.

A decode step has few rows, so it is bound by reading weights, and `F.linear` on plain weights
reaches a third to a half of the memory bandwidth (figures in docs/log.md). Prepacked weights double
that, and bias, GELU or residual are fused as post-ops. Inductor uses the same operators when it
freezes a model.

Shapes: x (..., in), weight (out, in), bias (out,).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_NUMEL = 2**18
"""Smaller weights stay in the CPU's cache, where packing gains nothing."""
BATCH_SIZE_HINT = 8
"""Rows of `x` that the layout is optimized for; it works for any number."""


class PackedLinear:
    """`F.linear` with an optional epilogue.

    Args:
        weight: used in place, unless it is packed.
        bias: used in place.
        pack: copy large weights into oneDNN's layout, where that is supported.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = False) -> None:
        self.weight, self.bias = weight, bias
        self.is_packed = pack and weight.numel() >= MIN_NUMEL and can_pack(weight)
        if self.is_packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_SIZE_HINT)

    def __call__(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias."""
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        # Arguments: post-op, its scalars, its algorithm.
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y

    def forward_gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        """GELU of the layer's output; `approximate` as in `F.gelu`."""
        if not self.is_packed:
            return F.gelu(F.linear(x, self.weight, self.bias), approximate=approximate)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu", [], approximate
        )
        return y

    def forward_add(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual` plus the layer's output."""
        if not self.is_packed:
            return residual + F.linear(x, self.weight, self.bias)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.weight, self.bias, "add"
        )
        return y


def can_pack(weight: Tensor) -> bool:
    """Whether this torch on this CPU computes correctly with packed weights of this dtype."""
    return weight.device.type == "cpu" and _packing_works(weight.dtype)


@functools.cache
def _packing_works(dtype: torch.dtype) -> bool:
    # Private operators, which may change with any release of torch: compare them with F.linear.
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 64, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(64, 64, generator=generator).to(dtype)
    plain, packed = PackedLinear(weight, weight[0]), PackedLinear(weight, weight[0])
    try:
        packed.weight = torch.ops.mkldnn._reorder_linear_weight(weight, BATCH_SIZE_HINT)
        packed.is_packed = True
        expected, outputs = (
            (p(x), p.forward_gelu(x), p.forward_gelu(x, "none"), p.forward_add(x, residual))
            for p in (plain, packed)
        )
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    # 64 terms are summed in another order, so the last bits may differ.
    tol = 16 * torch.finfo(dtype).eps
    pairs = zip(outputs, expected, strict=True)
    return all(torch.allclose(a, b, rtol=tol, atol=16 * tol) for a, b in pairs)
