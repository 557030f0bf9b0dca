"""A transformer block with a manual backward; see manual.py.

Gradients have llm.c's names: `dx` is the gradient of the loss with respect to `x`.

Each residual addition is fused with the LayerNorm after it. So a block takes and returns the
residual and the output of a sublayer that is not added yet. The backward of that LayerNorm also
computes the bias gradient of the projection whose output was added.

Shapes: N = B * T tokens in sequences of T, C channels, H heads of D = C / H channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from gptforge.device import memory_bandwidth
from gptforge.estimate.formulas import SMALL_N_EMBD
from gptforge.kernels.attention import SavedAttention, select_attention
from gptforge.kernels.dropout import DropoutSeed
from gptforge.kernels.layer_norm import SavedLayerNorm, add_layer_norm, layer_norm_backward
from gptforge.kernels.matmul import (
    accumulate_wgrad,
    linear,
    linear_dgrad,
    linear_gelu,
    linear_gelu_backward,
)
from gptforge.kernels.reductions import PendingReductions
from gptforge.model import GPT, Block
from gptforge.training.grad_buffer import GradBuffer

GROUPS_PER_BLOCK = 8
"""Groups of parameters in `grad_groups`."""


class ComputeWeights:
    """A model's fp32 master weights, and copies in the compute dtype, refreshed once a step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = self.ln_out_dtype = dtype
        self._copies: list[Tensor] = []
        self._sources: list[Tensor] = []

    def master(self, parameter: Tensor) -> Tensor:
        """Return a parameter's full-precision values."""
        return parameter

    def compute_copy(self, parameter: Tensor) -> Tensor:
        """Allocate the copy of a parameter in the compute dtype; call this once per parameter."""
        copy = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
        self._copies.append(copy)
        self._sources.append(self.master(parameter))
        return copy

    def refresh(self) -> None:
        """Copy the current weights; called at the start of each step."""
        # Cast once a step: autocast would cast the weights in every micro-batch.
        torch._foreach_copy_(self._copies, self._sources)

    def full(self, parameter: Tensor) -> Tensor:
        """Return the unsharded matrix that fp8 copies are cast from: fp32, or the compute copy."""
        return self.master(parameter)

    def wait_for(self, *copies: Tensor) -> None:
        """Wait until copies have arrived, before their first use in a step."""


class ManualLinear:
    """A linear layer."""

    def __init__(self, layer: nn.Linear, weights: ComputeWeights, grads: GradBuffer) -> None:
        self.weight_grad, self.bias_grad = grads.view(layer.weight), grads.view(layer.bias)
        self.compute_weight = weights.compute_copy(layer.weight)  # (out, in)
        self.compute_bias = weights.compute_copy(layer.bias)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out)."""
        return linear(x, self.compute_weight, self.compute_bias)

    def backward(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """Accumulate the weight's gradient, not the bias's; returns that of `x` (N, in)."""
        accumulate_wgrad(self.weight_grad, grad_output, x)
        return linear_dgrad(grad_output, self.compute_weight)


class ManualLayerNorm:
    """A residual addition and the LayerNorm after it, fused.

    `x_bias` is the bias of the projection whose output `x` is added, if any. Its gradient is the
    column sum of the gradient of `x`, so this layer's backward computes it.
    """

    def __init__(
        self, layer: nn.LayerNorm, x_bias: Tensor | None, weights: ComputeWeights, grads: GradBuffer
    ) -> None:
        self._weight, self._bias = weights.master(layer.weight), weights.master(layer.bias)
        self.out_dtype = weights.ln_out_dtype
        biases = [] if x_bias is None else [x_bias]
        self._grads = grads.contiguous_view(layer.weight, layer.bias, *biases)

    def forward(
        self, residual: Tensor, x: Tensor | None, dropout: DropoutSeed | None
    ) -> tuple[Tensor, SavedLayerNorm]:
        """LayerNorm(residual + dropout(x)); the sum is the new residual, in the saved tensors."""
        return add_layer_norm(residual, x, self._weight, self._bias, dropout, self.out_dtype)

    def backward(
        self,
        grad_output: Tensor,
        saved: SavedLayerNorm,
        grad_residual: Tensor | None,
        pending: PendingReductions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `residual` and of `x`."""
        return layer_norm_backward(
            grad_output, saved, self._weight, grad_residual, self._grads, pending
        )


class BlockDropout(NamedTuple):
    """Dropout seeds of a block; None without dropout."""

    residual: DropoutSeed | None = None
    """Seed for `mlp_out`; in the first block, for the embedding."""
    attn_probs: DropoutSeed | None = None
    attn_output: DropoutSeed | None = None
    """Seed for the output of the attention sublayer."""


class SavedActivations(NamedTuple):
    """What a block's backward needs from its forward: 12 C or 16 C elements per token."""

    ln_1: SavedLayerNorm  # C elements per token: the residual
    ln_1_out: Tensor  # (N, C)
    atty: Tensor  # (N, C), attention output before its projection
    attn: SavedAttention  # 3C: q, k and v; `out` is usually a view of `atty`
    ln_2: SavedLayerNorm  # C: the residual after attention
    ln_2_out: Tensor  # (N, C)
    fch: Tensor  # (N, 4C), the GELU's input
    fch_gelu: Tensor | None  # (N, 4C), the GELU's output; None to recompute it


class ManualBlock:
    """A transformer block.

    Args:
        block: the module whose weights are used.
        prev_bias: bias of the projection that computes `mlp_out`; None for the first block.
        weights: allocates copies in the compute dtype.
        grads: accumulates the gradients.
        save_gelu: save the GELU's output instead of recomputing it.
    """

    linear_class: type[ManualLinear] = ManualLinear

    def __init__(
        self,
        block: Block,
        prev_bias: Tensor | None,
        weights: ComputeWeights,
        grads: GradBuffer,
        *,
        save_gelu: bool,
    ) -> None:
        self._save_gelu, self._weights = save_gelu, weights
        device, n_embd = block.ln_1.weight.device, len(block.ln_1.weight)
        attn, mlp = block.attn, block.mlp
        self._n_head, self._head_size = attn.n_head, n_embd // attn.n_head
        self._separate_dgelu = prefer_separate_dgelu(device, n_embd)
        self._attention = select_attention(device, weights.dtype, head_size=self._head_size)
        self.ln_1 = ManualLayerNorm(block.ln_1, prev_bias, weights, grads)
        self.ln_2 = ManualLayerNorm(block.ln_2, attn.c_proj.bias, weights, grads)
        layers = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        self._linears = [self.linear_class(layer, weights, grads) for layer in layers]
        self.c_attn, self.attn_proj, self.c_fc, self.mlp_proj = self._linears

    def forward(
        self, residual: Tensor, mlp_out: Tensor | None, seq_len: int, dropout: BlockDropout
    ) -> tuple[Tensor, SavedActivations]:
        """Run the block.

        Args:
            residual: (N, C).
            mlp_out: (N, C) MLP output of the previous block, not yet added to the residual.
            seq_len: tokens in a sequence.
            dropout: seeds.

        Returns:
            This block's MLP output (N, C), not yet added to the residual, which is
            `saved.ln_2.residual`; and the saved activations.
        """
        # With ZeRO-1 this block's weights may still be arriving from the other ranks.
        self._weights.wait_for(*(layer.compute_weight for layer in self._linears))
        ln_1_out, ln_1 = self.ln_1.forward(residual, mlp_out, dropout.residual)  # (N, C)
        qkv = self.c_attn.forward(ln_1_out).view(-1, seq_len, 3, self._n_head, self._head_size)
        atty, attn = self._attention.forward(qkv, dropout.attn_probs)  # (N, C)
        attn_out = self.attn_proj.forward(atty)  # (N, C)
        # Overwrites `attn_out` with the new residual.
        ln_2_out, ln_2 = self.ln_2.forward(ln_1.residual, attn_out, dropout.attn_output)  # (N, C)
        fch, fch_gelu = linear_gelu(
            ln_2_out, self.c_fc.compute_weight, self.c_fc.compute_bias
        )  # (N, 4C)
        mlp_out = self.mlp_proj.forward(fch_gelu)  # (N, C)
        saved_gelu = fch_gelu if self._save_gelu else None
        return mlp_out, SavedActivations(
            ln_1, ln_1_out, atty, attn, ln_2, ln_2_out, fch, saved_gelu
        )

    def backward(
        self, dresidual: Tensor, dmlp_out: Tensor, saved: SavedActivations
    ) -> tuple[Tensor, Tensor]:
        """Backpropagate through the block, and accumulate its gradients.

        Args:
            dresidual: (N, C) gradient of the residual after the block; overwritten.
            dmlp_out: (N, C) gradient of the MLP output; the same tensor without dropout.
            saved: from `forward`.

        Returns:
            The gradients of `forward`'s `residual` and `mlp_out`, (N, C) each.
        """
        # One kernel at the end finishes the column sums for all biases and norms.
        pending = PendingReductions()
        dfch, fch_gelu = linear_gelu_backward(
            dmlp_out, self.mlp_proj.compute_weight, saved.fch, saved.fch_gelu,
            self.c_fc.bias_grad, pending, separate_dgelu=self._separate_dgelu,
        )  # fmt: skip
        accumulate_wgrad(self.mlp_proj.weight_grad, dmlp_out, fch_gelu)
        dln_2 = self.c_fc.backward(saved.ln_2_out, dfch)  # (N, C)
        dresidual, dattn_out = self.ln_2.backward(dln_2, saved.ln_2, dresidual, pending)
        datty = self.attn_proj.backward(saved.atty, dattn_out)  # (N, C)
        # (N, 3C)
        dqkv = self._attention.backward(datty, saved.attn, self.c_attn.bias_grad, pending)
        dln_1 = self.c_attn.backward(saved.ln_1_out, dqkv)  # (N, C)
        dresidual, dmlp_out = self.ln_1.backward(dln_1, saved.ln_1, dresidual, pending)
        pending.flush()
        return dresidual, dmlp_out


def grad_groups(model: GPT) -> list[list[Tensor]]:
    """List the parameters in the order in which the backward pass computes their gradients.

    One kernel computes all gradients of a group. The final LayerNorm's group comes first, then
    `GROUPS_PER_BLOCK` groups for each block, last block first, then the embeddings.
    """
    names = ("ln_f.weight", "ln_f.bias", "wpe.weight", "wte.weight")
    ln_f, ln_f_bias, wpe, wte = (model.get_parameter(f"transformer.{name}") for name in names)
    norm: list[Tensor] = [ln_f, ln_f_bias]
    groups: list[list[Tensor]] = []
    for block in reversed(list(model.blocks())):
        attn, mlp = block.attn, block.mlp
        groups += [
            [*norm, mlp.c_proj.bias],
            [mlp.c_proj.weight], [mlp.c_fc.bias], [mlp.c_fc.weight],
            [block.ln_2.weight, block.ln_2.bias, attn.c_proj.bias],
            [attn.c_proj.weight], [attn.c_attn.bias], [attn.c_attn.weight],
        ]  # fmt: skip
        norm = [block.ln_1.weight, block.ln_1.bias]
    return [*groups, norm, [wpe], [wte]]


def prefer_separate_dgelu(device: torch.device, n_embd: int) -> bool:
    """Whether a separate kernel for the GELU's derivative is faster than a GEMM epilogue.

    On an H200 it is. An H100 runs the same GEMMs with less memory bandwidth, so the epilogue wins.
    For small GEMMs the separate kernel wins on both.
    """
    # Bytes per second: 3.35e12 on an H100, 4.8e12 on an H200.
    return n_embd <= SMALL_N_EMBD or memory_bandwidth(device) > 4.5e12
