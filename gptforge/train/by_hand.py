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

from gptforge.costs import head_tokens, keeps_gelu_every
from gptforge.hardware import PLAIN, Kernels
from gptforge.kernels.block import add_rows, embed
from gptforge.kernels.dropout import Drop, throw
from gptforge.kernels.head import cross_entropy_in_place
from gptforge.kernels.products import add_product, linear
from gptforge.model import GPT, IGNORE, Block
from gptforge.train.block_by_hand import BlockByHand, Drops, KeptOfBlock, LayerNorm
from gptforge.train.gradients import Gradients
from gptforge.train.savings import NO_SAVINGS, Savings
from gptforge.train.weights import Weights

FEW_IDS = 1024
"""Rows of a token table up to which its gradient as a first layer is made by a product."""


class ByHand:
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
        savings: Savings = NO_SAVINGS,
        kernels: Kernels = PLAIN,
        weights: Weights | None = None,
        gradients: Callable[[list[list[Tensor]]], Gradients] = Gradients,
    ) -> None:
        self._dropout = model.config.dropout
        # What torch's attention makes again it would drop anew.
        assert not (self._dropout and savings.recompute), "not written out here"
        assert model.config.activation == "gelu_tanh", "not written out here"
        self.model = model
        self._recompute = savings.recompute
        self._head_tokens = savings.loss_chunk or head_tokens(model.config.vocab_size)
        self._weights = weights = weights or Weights(dtype)
        parts = model.transformer
        wte, wpe, ln_f = parts["wte"], parts["wpe"], parts["ln_f"]
        assert isinstance(wte, nn.Embedding) and isinstance(wpe, nn.Embedding)
        assert isinstance(ln_f, nn.LayerNorm)
        self._wte, self._wpe = weights.wide(wte.weight), weights.wide(wpe.weight)
        self._table = weights.narrow(wte.weight)  # (V, C)
        self._blocks: list[BlockByHand] = []
        before, every = None, keeps_gelu_every(model.config.n_embd)
        for number, block in enumerate(model.blocks()):
            assert isinstance(block, Block)
            # One block's worth is no matter.
            keeps_gelu = savings.recompute or number % every == 0
            one = BlockByHand(block, before, weights, keeps_gelu=keeps_gelu, kernels=kernels)
            self._blocks.append(one)
            before = block.mlp.c_proj.bias
        assert before is not None
        self._norm = LayerNorm(ln_f, weights)
        self._norm.vectors.append(before)
        groups = [group for block in reversed(self._blocks) for group in block.groups()]
        self.gradients = gradients([self._norm.vectors, *groups, [wpe.weight], [wte.weight]])
        self.made: Callable[[int], None] = lambda groups: None
        """Told how many groups of gradients have nothing more to come in this micro-batch."""
        self._norm.add_to(self.gradients)
        for one in self._blocks:
            one.add_to(self.gradients)
        self._to_wte, self._to_wpe = (self.gradients.of(x.weight) for x in (wte, wpe))

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first micro-batch of an update: no gradients, and the weights as they are."""
        self.gradients.clear()
        self._weights.begin()

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
        drops: list[Drop | None] = [None] * (1 + 3 * len(self._blocks))
        drops = [*throw(len(drops), self._dropout, idx.device)] or drops
        stream = embed(idx, self._wte, self._wpe, self._weights.dtype, drops[0])  # (N, C)
        branch = None
        kept: list[KeptOfBlock | Tensor] = []
        for number, block in enumerate(self._blocks):
            its = Drops(*drops[3 * number : 3 * number + 3])
            branch, everything = block.forward(stream, branch, length, its)
            stream = everything.norm_2.stream
            kept.append(everything.norm_1.stream if self._recompute else everything)
            del everything
        normal, norm = self._norm.forward(stream, branch, drops[-1])
        loss, upstream = self._head(normal, targets.flatten(), scale)
        upstream, to_branch = self._norm.backward(upstream, norm, None)
        made = 1
        for block in reversed(self._blocks):
            one = kept.pop()
            if isinstance(one, Tensor):
                _, one = block.forward(one, None, length, Drops())
            upstream, to_branch = block.backward(upstream, to_branch, one)
            del one
            made += len(block.groups())
            self.made(made)
        # In front of the first block there is no branch: this is what the embedding was dropped to.
        self._embed_backward(to_branch, idx)
        return loss

    def clip(self, longest: float) -> Tensor:
        """Shorten the gradients if their norm is above `longest`; the norm before that."""
        return self.gradients.clip(longest)

    def _embed_backward(self, upstream: Tensor, idx: Tensor) -> None:
        """Add the gradient of the first layer's output (N, C) to those of the tables."""
        wide, tokens = self._to_wte.dtype, idx.flatten()
        self._to_wpe[: idx.size(1)] += upstream.view(*idx.shape, -1).sum(0, dtype=wide)
        size = len(self._to_wte)
        if size <= FEW_IDS:
            # Rows that many tokens share are slow to add to one by one. Ones and noughts are exact.
            marks = upstream.new_zeros(len(tokens), size).scatter_(1, tokens[:, None], 1)
            add_product(self._to_wte, marks, upstream)
        else:
            add_rows(upstream, tokens, self._to_wte)

    def _head(
        self, normal: Tensor, targets: Tensor, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and `scale` times its gradient with respect to `normal` (N, C)."""
        upstream = torch.empty_like(normal)
        losses = []
        for start in range(0, len(normal), self._head_tokens):
            piece = slice(start, start + self._head_tokens)
            logits = linear(normal[piece], self._table)  # (n, V)
            losses.append(cross_entropy_in_place(logits, targets[piece], IGNORE, scale).sum())
            torch.mm(logits, self._table, out=upstream[piece])
            add_product(self._to_wte, logits, normal[piece])
            del logits
        return torch.stack(losses).sum(), upstream
