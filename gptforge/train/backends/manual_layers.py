"""A transformer block written out, forward and backward; see by_hand.py.

Shapes: N tokens, in windows of T, C channels, H heads of D = C / H.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptforge.device import memory_bandwidth
from gptforge.estimate.formulas import SMALL_N_EMBD
from gptforge.kernel_select import KernelConfig
from gptforge.kernels.attention import SavedAttention, select_attention
from gptforge.kernels.dropout import DropoutSeed
from gptforge.kernels.gelu_products import ByCublas, ByQuack, GeluProducts
from gptforge.kernels.layer_norm import SavedLayerNorm, add_layer_norm, layer_norm_backward
from gptforge.kernels.matmul import accumulate_wgrad, linear, linear_dgrad
from gptforge.kernels.reductions import PendingReductions
from gptforge.model import Block
from gptforge.train.grad_buffer import GradBuffer


class ComputeWeights:
    """A model's own weights, and narrow copies of them that are made once an update.

    Args:
        dtype: of the copies.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Of the products, as well."""
        self._copies: list[Tensor] = []
        self._sources: list[Tensor] = []

    def master(self, parameter: Tensor) -> Tensor:
        """A parameter's values in its own type."""
        return parameter

    def compute_copy(self, parameter: Tensor) -> Tensor:
        """Make room for its narrow copy, which each update fills; asked for once a parameter."""
        copy = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
        self._copies.append(copy)
        self._sources.append(self.master(parameter))
        return copy

    def refresh(self) -> None:
        """Before an update: copy the weights as they are."""
        torch._foreach_copy_(self._copies, self._sources)

    def wait_for(self, *copies: Tensor) -> None:
        """Before the first use of narrow copies in an update."""


class ManualLinear:
    """A linear layer: a narrow copy of its weights to compute with, and where gradients go."""

    weight_grad: Tensor
    bias_grad: Tensor

    def __init__(self, layer: nn.Linear, weights: ComputeWeights) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.compute_weight = weights.compute_copy(layer.weight)  # (out, in)
        self.compute_bias = weights.compute_copy(layer.bias)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return linear(x, self.compute_weight, self.compute_bias)

    def backward(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """The gradient of x; that of the weights is added to theirs, that of the bias is not."""
        accumulate_wgrad(self.weight_grad, grad_output, x)
        return linear_dgrad(grad_output, self.compute_weight)


class ManualLayerNorm:
    """A LayerNorm with the addition in front of it."""

    _sums: Tensor

    def __init__(self, layer: nn.LayerNorm, weights: ComputeWeights) -> None:
        self.grad_group: list[Tensor] = [layer.weight, layer.bias]
        """Parameters whose gradients are made here, side by side."""
        self._weight, self._bias = weights.master(layer.weight), weights.master(layer.bias)

    def bind(self, gradients: GradBuffer) -> None:
        """From now on gradients are added up there."""
        self._sums = gradients.contiguous_view(*self.grad_group)

    def forward(
        self, stream: Tensor, branch: Tensor | None, drop: DropoutSeed | None
    ) -> tuple[Tensor, SavedLayerNorm]:
        """As `add_norm`."""
        return add_layer_norm(stream, branch, self._weight, self._bias, drop)

    def backward(
        self,
        upstream: Tensor,
        norm: SavedLayerNorm,
        beside: Tensor | None,
        unfinished: PendingReductions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `norm_backward`."""
        return layer_norm_backward(upstream, norm, self._weight, beside, self._sums, unfinished)


class BlockDropout(NamedTuple):
    """What is dropped where, if anything is."""

    residual: DropoutSeed | None = None
    """From the branch that the block is given, or from the embedding."""
    attn_probs: DropoutSeed | None = None
    """In its attention."""
    attn_output: DropoutSeed | None = None
    """From the attention's branch."""


class SavedActivations(NamedTuple):
    """What a block's way back needs from its way forward: 12 or 16 C numbers a token in all."""

    norm_1: SavedLayerNorm
    normal_1: Tensor
    mixed: Tensor
    attention: SavedAttention
    norm_2: SavedLayerNorm
    normal_2: Tensor
    inner: Tensor
    activated: Tensor | None


class ManualBlock:
    """A transformer block. `before` is the bias of what the block in front of it adds last.

    With `keeps_gelu` the GELU's output is kept. Otherwise it is made again on the way back.
    """

    def __init__(
        self,
        block: Block,
        before: Tensor | None,
        weights: ComputeWeights,
        *,
        save_gelu: bool,
        kernels: KernelConfig,
    ) -> None:
        self._keeps_gelu = save_gelu
        device, width = block.ln_1.weight.device, len(block.ln_1.weight)
        apart = prefer_separate_dgelu(device, width)
        self._gelu: GeluProducts = ByQuack() if kernels.quack else ByCublas(slope_apart=apart)
        self.n_head = block.attn.n_head
        self._head_size = width // self.n_head
        self._attention = select_attention(
            device, weights.dtype, head_size=self._head_size, dropout=block.attn.dropout
        )
        self.ln_1 = ManualLayerNorm(block.ln_1, weights)
        self.ln_2 = ManualLayerNorm(block.ln_2, weights)
        self._weights = weights
        self.c_attn = ManualLinear(block.attn.c_attn, weights)
        self.attn_proj = ManualLinear(block.attn.c_proj, weights)
        self.c_fc = ManualLinear(block.mlp.c_fc, weights)
        self.mlp_proj = ManualLinear(block.mlp.c_proj, weights)
        self.linears = (self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj)
        # Whatever is added to the stream has its gradient from the LayerNorm behind the addition,
        # and so has its bias.
        self.ln_2.grad_group.append(self.attn_proj.bias)
        if before is not None:
            self.ln_1.grad_group.append(before)

    def grad_groups(self) -> list[list[Tensor]]:
        """The parameters in the order in which their gradients are made."""
        return [
            [self.mlp_proj.weight], [self.c_fc.bias], [self.c_fc.weight], self.ln_2.grad_group,
            [self.attn_proj.weight], [self.c_attn.bias], [self.c_attn.weight], self.ln_1.grad_group,
        ]  # fmt: skip

    def bind(self, gradients: GradBuffer) -> None:
        """From now on gradients are added up there."""
        for layer in self.linears:
            layer.weight_grad = gradients.view(layer.weight)
            layer.bias_grad = gradients.view(layer.bias)
        self.ln_1.bind(gradients)
        self.ln_2.bind(gradients)

    def forward(
        self, stream: Tensor, branch: Tensor | None, length: int, drops: BlockDropout
    ) -> tuple[Tensor, SavedActivations]:
        """The block's last branch (N, C), not yet added to the stream, which is among the kept."""
        self._weights.wait_for(*(layer.compute_weight for layer in self.linears))
        normal_1, norm_1 = self.ln_1.forward(stream, branch, drops.residual)
        qkv = self.c_attn.forward(normal_1).view(-1, length, 3, self.n_head, self._head_size)
        mixed, attention = self._attention.forward(qkv, drops.attn_probs)  # (N, C)
        branch = self.attn_proj.forward(mixed)
        normal_2, norm_2 = self.ln_2.forward(norm_1.residual, branch, drops.attn_output)
        inner, activated = self._gelu.forward(
            normal_2, self.c_fc.compute_weight, self.c_fc.compute_bias
        )  # (N, 4 C)
        branch = self.mlp_proj.forward(activated)
        kept_gelu = activated if self._keeps_gelu else None
        return branch, SavedActivations(
            norm_1, normal_1, mixed, attention, norm_2, normal_2, inner, kept_gelu
        )

    def backward(
        self, upstream: Tensor, to_branch: Tensor, kept: SavedActivations
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the stream and the branch behind the block to those before it: all (N, C).

        The two may be one and the same.
        """
        sums, to_bias = PendingReductions(), self.c_fc.bias_grad
        wide, activated = self._gelu.backward(
            to_branch, self.mlp_proj.compute_weight, kept.inner, kept.activated, to_bias, sums
        )  # (N, 4 C)
        accumulate_wgrad(self.mlp_proj.weight_grad, to_branch, activated)
        narrow = self.c_fc.backward(kept.normal_2, wide)
        upstream, to_branch = self.ln_2.backward(narrow, kept.norm_2, upstream, sums)
        narrow = self.attn_proj.backward(kept.mixed, to_branch)
        to_bias = self.c_attn.bias_grad
        wide = self._attention.backward(narrow, kept.attention, to_bias, sums)  # (N, 3 C)
        narrow = self.c_attn.backward(kept.normal_1, wide)
        before = self.ln_1.backward(narrow, kept.norm_1, upstream, sums)
        sums.flush()
        return before


def prefer_separate_dgelu(device: torch.device, channels: int) -> bool:
    """Whether a pass takes the GELU's slope faster than a product does on its way, by `ByCublas`.

    On an H200 it does. An H100 has the same products and less bandwidth, and is the other way
    round. Small products are slower for it everywhere.
    """
    return channels <= SMALL_N_EMBD or memory_bandwidth(device) > 4.5e12
