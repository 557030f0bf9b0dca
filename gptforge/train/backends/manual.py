"""Loss and gradients of a GPT written out, forward and backward, without autograd.

Written out, three things are possible that autograd and the compiler do not do: gradients are added
in float32 where they are produced, by the product that makes them; what is not needed again is
written over; and there is nothing to compile. After llm.c (Karpathy et al., 2024). The products are
torch's, the rest is in `kernels`; `GPT.forward` is the reference that the tests hold it to.

Shapes: B windows, T tokens each, N = B * T, C channels, H heads of D = C / H, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptforge.estimate.formulas import default_loss_chunk, gelu_save_interval
from gptforge.kernel_select import DEFAULT_KERNELS, KernelConfig
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.dropout import DropoutSeed, draw_dropout_seeds
from gptforge.kernels.embedding import embedding, embedding_backward
from gptforge.kernels.matmul import accumulate_wgrad, linear
from gptforge.model import GPT, IGNORE_INDEX, Block
from gptforge.train.backends.manual_layers import (
    BlockDropout,
    ComputeWeights,
    ManualBlock,
    ManualLayerNorm,
    SavedActivations,
)
from gptforge.train.grad_buffer import GradBuffer
from gptforge.train.savings import DEFAULT_SAVINGS, Savings

MAX_ONE_HOT_VOCAB = 1024
"""Rows of a token table up to which its gradient as a first layer is made by a product."""


class ManualBackend:
    """A GPT's loss and gradients, computed in `dtype` from its float32 weights.

    Args:
        model: whose parameters get the gradients.
        dtype: of the products and of the residual stream.
        savings: what to make again on the way back.
        kernels: which of those there is a choice between.
        weights: to compute with; by default the model's own, which lie whole on this device.
        gradients: where they go, made of the groups of parameters that they are made in.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        savings: Savings = DEFAULT_SAVINGS,
        kernels: KernelConfig = DEFAULT_KERNELS,
        weights: ComputeWeights | None = None,
        gradients: Callable[[list[list[Tensor]]], GradBuffer] = GradBuffer,
    ) -> None:
        self._dropout = model.config.dropout
        # What torch's attention makes again it would drop anew.
        assert not (self._dropout and savings.activation_checkpointing), "not written out here"
        assert model.config.activation == "gelu_tanh", "not written out here"
        self.model = model
        self._recompute = savings.activation_checkpointing
        self._head_tokens = savings.loss_chunk or default_loss_chunk(model.config.vocab_size)
        self._weights = weights = weights or ComputeWeights(dtype)
        parts = model.transformer
        wte, wpe, ln_f = parts["wte"], parts["wpe"], parts["ln_f"]
        assert isinstance(wte, nn.Embedding) and isinstance(wpe, nn.Embedding)
        assert isinstance(ln_f, nn.LayerNorm)
        self._wte, self._wpe = weights.master(wte.weight), weights.master(wpe.weight)
        self._table = weights.compute_copy(wte.weight)  # (V, C)
        self._blocks: list[ManualBlock] = []
        before, every = None, gelu_save_interval(model.config.n_embd)
        for number, block in enumerate(model.blocks()):
            assert isinstance(block, Block)
            # One block's worth is no matter.
            keeps_gelu = savings.activation_checkpointing or number % every == 0
            one = ManualBlock(block, before, weights, save_gelu=keeps_gelu, kernels=kernels)
            self._blocks.append(one)
            before = block.mlp.c_proj.bias
        assert before is not None
        self._norm = ManualLayerNorm(ln_f, weights)
        self._norm.grad_group.append(before)
        groups = [group for block in reversed(self._blocks) for group in block.grad_groups()]
        self.grads = gradients([self._norm.grad_group, *groups, [wpe.weight], [wte.weight]])
        self.on_grads_ready: Callable[[int], None] = lambda groups: None
        """Told how many groups of gradients have nothing more to come in this micro-batch."""
        self._norm.bind(self.grads)
        for one in self._blocks:
            one.bind(self.grads)
        self._to_wte, self._to_wpe = (self.grads.view(x.weight) for x in (wte, wpe))

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Before the first micro-batch of an update: no gradients, and the weights as they are."""
        self.grads.zero_()
        self._weights.refresh()

    @torch.no_grad()
    def __call__(self, idx: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        """The loss, summed over the tokens; `scale` times its gradients are added to what is there.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids one further on; IGNORE where there is none.
            scale: factor of the gradients, such as one over the tokens of an update; as a float32
                scalar on the device it may change when a recording is played back.
        """
        length = idx.size(1)
        # Behind the embedding; in the attention, and behind both branches, of each block.
        drops: list[DropoutSeed | None] = [None] * (1 + 3 * len(self._blocks))
        drops = [*draw_dropout_seeds(len(drops), self._dropout, idx.device)] or drops
        stream = embedding(idx, self._wte, self._wpe, self._weights.dtype, drops[0])  # (N, C)
        branch = None
        kept: list[SavedActivations | Tensor] = []
        for number, block in enumerate(self._blocks):
            its = BlockDropout(*drops[3 * number : 3 * number + 3])
            branch, everything = block.forward(stream, branch, length, its)
            stream = everything.norm_2.residual
            kept.append(everything.norm_1.residual if self._recompute else everything)
            del everything
        normal, norm = self._norm.forward(stream, branch, drops[-1])
        loss, upstream = self._head(normal, targets.flatten(), scale)
        upstream, to_branch = self._norm.backward(upstream, norm, None)
        made = 1
        for block in reversed(self._blocks):
            one = kept.pop()
            if isinstance(one, Tensor):
                _, one = block.forward(one, None, length, BlockDropout())
            upstream, to_branch = block.backward(upstream, to_branch, one)
            del one
            made += len(block.grad_groups())
            self.on_grads_ready(made)
        # In front of the first block there is no branch: this is what the embedding was dropped to.
        self._embed_backward(to_branch, idx)
        return loss

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Shorten the gradients if their norm is above `longest`; the norm before that."""
        return self.grads.clip_grad_norm_(max_norm)

    def _embed_backward(self, upstream: Tensor, idx: Tensor) -> None:
        """Add the gradient of the first layer's output (N, C) to those of the tables."""
        wide, tokens = self._to_wte.dtype, idx.flatten()
        self._to_wpe[: idx.size(1)] += upstream.view(*idx.shape, -1).sum(0, dtype=wide)
        size = len(self._to_wte)
        if size <= MAX_ONE_HOT_VOCAB:
            # Rows that many tokens share are slow to add to one by one. Ones and noughts are exact.
            marks = upstream.new_zeros(len(tokens), size).scatter_(1, tokens[:, None], 1)
            accumulate_wgrad(self._to_wte, marks, upstream)
        else:
            embedding_backward(upstream, tokens, self._to_wte)

    def _head(
        self, normal: Tensor, targets: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and `scale` times its gradient with respect to `normal` (N, C)."""
        upstream = torch.empty_like(normal)
        losses = []
        for start in range(0, len(normal), self._head_tokens):
            piece = slice(start, start + self._head_tokens)
            logits = linear(normal[piece], self._table)  # (n, V)
            losses.append(cross_entropy_in_place(logits, targets[piece], IGNORE_INDEX, scale).sum())
            torch.mm(logits, self._table, out=upstream[piece])
            accumulate_wgrad(self._to_wte, logits, normal[piece])
            del logits
        return torch.stack(losses).sum(), upstream
