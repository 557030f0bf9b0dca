"""A transformer block written out, forward and backward; see by_hand.py.

Shapes: N tokens, in windows of T, C channels, H heads of D = C / H.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptforge.costs import FEW_CHANNELS
from gptforge.hardware import Kernels, memory_bandwidth
from gptforge.kernels.block import Norm, add_norm, norm_backward
from gptforge.kernels.dropout import Drop
from gptforge.kernels.gelu_products import ByCublas, ByQuack, GeluProducts
from gptforge.kernels.packed_attention import Kept, fastest
from gptforge.kernels.products import add_product, back, linear
from gptforge.kernels.sums import Unfinished
from gptforge.model import Block
from gptforge.train.gradients import Gradients
from gptforge.train.weights import Weights


class Linear:
    """A linear layer: a narrow copy of its weights to compute with, and where gradients go."""

    gradient: Tensor
    bias_gradient: Tensor

    def __init__(self, layer: nn.Linear, weights: Weights) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.narrow = weights.narrow(layer.weight)  # (out, in)
        self.narrow_bias = weights.narrow(layer.bias)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return linear(x, self.narrow, self.narrow_bias)

    def backward(self, x: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of x; that of the weights is added to theirs, that of the bias is not."""
        add_product(self.gradient, upstream, x)
        return back(upstream, self.narrow)


class LayerNorm:
    """A LayerNorm with the addition in front of it."""

    _sums: Tensor

    def __init__(self, layer: nn.LayerNorm, weights: Weights) -> None:
        self.vectors: list[Tensor] = [layer.weight, layer.bias]
        """Parameters whose gradients are made here, side by side."""
        self._weight, self._bias = weights.wide(layer.weight), weights.wide(layer.bias)

    def add_to(self, gradients: Gradients) -> None:
        """From now on gradients are added up there."""
        self._sums = gradients.side_by_side(*self.vectors)

    def forward(
        self, stream: Tensor, branch: Tensor | None, drop: Drop | None
    ) -> tuple[Tensor, Norm]:
        """As `add_norm`."""
        return add_norm(stream, branch, self._weight, self._bias, drop)

    def backward(
        self,
        upstream: Tensor,
        norm: Norm,
        beside: Tensor | None,
        unfinished: Unfinished | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `norm_backward`."""
        return norm_backward(upstream, norm, self._weight, beside, self._sums, unfinished)


class Drops(NamedTuple):
    """What is dropped where, if anything is."""

    before: Drop | None = None
    """From the branch that the block is given, or from the embedding."""
    shares: Drop | None = None
    """In its attention."""
    mixed: Drop | None = None
    """From the attention's branch."""


class KeptOfBlock(NamedTuple):
    """What a block's way back needs from its way forward: 12 or 16 C numbers a token in all."""

    norm_1: Norm
    normal_1: Tensor
    mixed: Tensor
    attention: Kept
    norm_2: Norm
    normal_2: Tensor
    inner: Tensor
    activated: Tensor | None


class BlockByHand:
    """A transformer block. `before` is the bias of what the block in front of it adds last.

    With `keeps_gelu` the GELU's output is kept. Otherwise it is made again on the way back.
    """

    def __init__(
        self,
        block: Block,
        before: Tensor | None,
        weights: Weights,
        *,
        keeps_gelu: bool,
        kernels: Kernels,
    ) -> None:
        self._keeps_gelu = keeps_gelu
        device, width = block.ln_1.weight.device, len(block.ln_1.weight)
        apart = is_slope_faster_apart(device, width)
        self._gelu: GeluProducts = ByQuack() if kernels.quack else ByCublas(slope_apart=apart)
        self.n_head = block.attn.n_head
        self._head_size = width // self.n_head
        self._attention = fastest(
            device, weights.dtype, head_size=self._head_size, dropout=block.attn.dropout
        )
        self.norm_1 = LayerNorm(block.ln_1, weights)
        self.norm_2 = LayerNorm(block.ln_2, weights)
        self._weights = weights
        self.c_attn = Linear(block.attn.c_attn, weights)
        self.mix = Linear(block.attn.c_proj, weights)
        self.c_fc = Linear(block.mlp.c_fc, weights)
        self.c_proj = Linear(block.mlp.c_proj, weights)
        self.linears = (self.c_attn, self.mix, self.c_fc, self.c_proj)
        # Whatever is added to the stream has its gradient from the LayerNorm behind the addition,
        # and so has its bias.
        self.norm_2.vectors.append(self.mix.bias)
        if before is not None:
            self.norm_1.vectors.append(before)

    def groups(self) -> list[list[Tensor]]:
        """The parameters in the order in which their gradients are made."""
        return [
            [self.c_proj.weight], [self.c_fc.bias], [self.c_fc.weight], self.norm_2.vectors,
            [self.mix.weight], [self.c_attn.bias], [self.c_attn.weight], self.norm_1.vectors,
        ]  # fmt: skip

    def add_to(self, gradients: Gradients) -> None:
        """From now on gradients are added up there."""
        for layer in self.linears:
            layer.gradient = gradients.of(layer.weight)
            layer.bias_gradient = gradients.of(layer.bias)
        self.norm_1.add_to(gradients)
        self.norm_2.add_to(gradients)

    def forward(
        self, stream: Tensor, branch: Tensor | None, length: int, drops: Drops
    ) -> tuple[Tensor, KeptOfBlock]:
        """The block's last branch (N, C), not yet added to the stream, which is among the kept."""
        self._weights.wait_for(*(layer.narrow for layer in self.linears))
        normal_1, norm_1 = self.norm_1.forward(stream, branch, drops.before)
        qkv = self.c_attn.forward(normal_1).view(-1, length, 3, self.n_head, self._head_size)
        mixed, attention = self._attention.forward(qkv, drops.shares)  # (N, C)
        branch = self.mix.forward(mixed)
        normal_2, norm_2 = self.norm_2.forward(norm_1.stream, branch, drops.mixed)
        inner, activated = self._gelu.forward(
            normal_2, self.c_fc.narrow, self.c_fc.narrow_bias
        )  # (N, 4 C)
        branch = self.c_proj.forward(activated)
        kept_gelu = activated if self._keeps_gelu else None
        return branch, KeptOfBlock(
            norm_1, normal_1, mixed, attention, norm_2, normal_2, inner, kept_gelu
        )

    def backward(
        self, upstream: Tensor, to_branch: Tensor, kept: KeptOfBlock
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the stream and the branch behind the block to those before it: all (N, C).

        The two may be one and the same.
        """
        sums, to_bias = Unfinished(), self.c_fc.bias_gradient
        wide, activated = self._gelu.backward(
            to_branch, self.c_proj.narrow, kept.inner, kept.activated, to_bias, sums
        )  # (N, 4 C)
        add_product(self.c_proj.gradient, to_branch, activated)
        narrow = self.c_fc.backward(kept.normal_2, wide)
        upstream, to_branch = self.norm_2.backward(narrow, kept.norm_2, upstream, sums)
        narrow = self.mix.backward(kept.mixed, to_branch)
        to_bias = self.c_attn.bias_gradient
        wide = self._attention.backward(narrow, kept.attention, to_bias, sums)  # (N, 3 C)
        narrow = self.c_attn.backward(kept.normal_1, wide)
        before = self.norm_1.backward(narrow, kept.norm_1, upstream, sums)
        sums.finish()
        return before


def is_slope_faster_apart(device: torch.device, channels: int) -> bool:
    """Whether a pass takes the GELU's slope faster than a product does on its way, by `ByCublas`.

    On an H200 it does. An H100 has the same products and less bandwidth, and is the other way
    round. Small products are slower for it everywhere.
    """
    return channels <= FEW_CHANNELS or memory_bandwidth(device) > 4.5e12
