"""Loss and gradients of a GPT written out, forward and backward, without autograd.

Written out, three things are possible that autograd and the compiler do not do: gradients are added
in float32 where they are produced, by the product that makes them; what is not needed again is
written over; and there is nothing to compile. After llm.c (Karpathy et al., 2024). The products are
torch's, the rest is in `kernels`; `GPT.forward` is the reference that the tests hold it to.

Shapes: B windows, T tokens each, N = B * T, C channels, H heads of D = C / H, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptforge.costs import HEAD_TOKENS, KEEPS_GELU_EVERY
from gptforge.hardware import PLAIN, Kernels
from gptforge.kernels.block import add_norm, norm_backward
from gptforge.kernels.head import cross_entropy_in_place
from gptforge.kernels.products import linear
from gptforge.model import GPT, IGNORE, Block
from gptforge.train.block_by_hand import BlockByHand, KeptOfBlock, drop, drop_backward
from gptforge.train.gradients import Gradients, add_product, gradient_of
from gptforge.train.savings import NO_SAVINGS, Savings


class ByHand:
    """A GPT's loss and gradients, computed in `dtype` from its float32 weights.

    Args:
        model: whose parameters get the gradients.
        dtype: of the products and of the residual stream.
        savings: what to make again on the way back.
        kernels: which of those there is a choice between.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        savings: Savings = NO_SAVINGS,
        kernels: Kernels = PLAIN,
    ) -> None:
        self._dropout = model.config.dropout
        # What is made again would be dropped anew.
        assert not (self._dropout and savings.recompute), "not written out here"
        self.model, self._dtype = model, dtype
        self._recompute = savings.recompute
        self._head_tokens = savings.loss_chunk or HEAD_TOKENS
        parts = model.transformer
        wte, wpe, ln_f = parts["wte"], parts["wpe"], parts["ln_f"]
        assert isinstance(wte, nn.Embedding) and isinstance(wpe, nn.Embedding)
        assert isinstance(ln_f, nn.LayerNorm)
        self._wte, self._wpe, self._ln_f = wte.weight, wpe.weight, ln_f
        self._blocks: list[BlockByHand] = []
        before = None
        for number, block in enumerate(model.blocks()):
            assert isinstance(block, Block)
            # One block's worth is no matter.
            keeps_gelu = savings.recompute or number % KEEPS_GELU_EVERY == 0
            one = BlockByHand(block, before, dtype, keeps_gelu=keeps_gelu, kernels=kernels)
            self._blocks.append(one)
            before = block.mlp.c_proj.bias
        assert before is not None
        self._vectors: list[Tensor] = [ln_f.weight, ln_f.bias]
        if not self._dropout:
            self._vectors.append(before)
        self._table = torch.empty_like(self._wte, dtype=dtype, requires_grad=False)  # (V, C)
        groups = [group for block in reversed(self._blocks) for group in block.groups()]
        self.gradients = Gradients([self._vectors, *groups, [self._wpe], [self._wte]])
        self.made: Callable[[int], None] = lambda groups: None
        """Told how many groups of gradients have nothing more to come in this micro-batch."""
        self._sums = self.gradients.side_by_side(*self._vectors)
        for one in self._blocks:
            one.sums_1 = self.gradients.side_by_side(*one.vectors_1)
            one.sums_2 = self.gradients.side_by_side(*one.vectors_2)
        linears = [linear for block in self._blocks for linear in block.linears]
        self._narrow = [self._table, *(x for m in linears for x in (m.narrow, m.narrow_bias))]
        self._wide = [self._wte, *(x for m in linears for x in (m.weight, m.bias))]

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first micro-batch of an update: no gradients, and the weights as they are."""
        self.gradients.clear()
        torch._foreach_copy_(self._narrow, self._wide)

    @torch.no_grad()
    def __call__(self, idx: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        """The loss, summed over the tokens; `scale` times its gradients are added to what is there.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids one further on; IGNORE where there is none.
            scale: factor of the gradients, such as one over the tokens of an update; as a float32
                scalar on the device it may change when a recording is played back.
        """
        count, length = idx.shape
        x = F.embedding(idx, self._wte) + self._wpe[:length]  # (B, T, C)
        x, dropped = drop(x.flatten(0, 1), self._dropout)
        stream, branch = x.to(self._dtype), None  # (N, C)
        kept: list[KeptOfBlock | Tensor] = []
        for block in self._blocks:
            branch, everything = block.forward(stream, branch, length)
            stream = everything.norm_2.stream
            kept.append(everything.norm_1.stream if self._recompute else everything)
            del everything
        normal, norm = add_norm(stream, branch, self._ln_f.weight, self._ln_f.bias)
        loss, upstream = self._head(normal, targets.flatten(), scale)
        upstream = norm_backward(upstream, norm, self._ln_f.weight, None, self._sums)
        made = 1
        for block in reversed(self._blocks):
            one = kept.pop()
            if isinstance(one, Tensor):
                _, one = block.forward(one, None, length)
            upstream = block.backward(upstream, one)
            del one
            made += len(block.groups())
            self.made(made)
        wide = upstream.to(self._wte.dtype)
        if dropped is not None:
            wide = drop_backward(wide, dropped, self._dropout)
        gradient_of(self._wpe)[:length] += wide.view(count, length, -1).sum(0)
        gradient_of(self._wte).index_add_(0, idx.flatten(), wide)
        return loss

    def clip(self, longest: float) -> Tensor:
        """Shorten the gradients if their norm is above `longest`; the norm before that."""
        norm: Tensor = torch.linalg.vector_norm(self.gradients.flat)
        # As torch's clip_grad_norm_ does it: nothing waits for the norm.
        self.gradients.flat.mul_((longest / (norm + 1e-6)).clamp(max=1.0))
        return norm

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
            add_product(self._wte, logits, normal[piece])
            del logits
        return torch.stack(losses).sum(), upstream
