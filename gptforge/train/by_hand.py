"""Loss and gradients of a GPT written out, forward and backward, without autograd.

Written out, three things are possible that autograd and the compiler do not do: gradients are added
in float32 where they are produced, by the product that makes them; what is not needed again is
written over; and there is nothing to compile. After llm.c (Karpathy et al., 2024). The products are
torch's, the rest is in `kernels`; `GPT.forward` is the reference that the tests hold it to.

Shapes: B windows, T tokens each, N = B * T, C channels, H heads of D = C / H, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptforge.costs import HEAD_TOKENS, KEEPS_GELU_EVERY
from gptforge.kernels.block import (
    Norm,
    add_column_sums,
    add_norm,
    gelu_backward,
    norm_backward,
)
from gptforge.kernels.head import cross_entropy_in_place
from gptforge.kernels.packed_attention import ByFlash4, ByTorch, Kept, PackedAttention
from gptforge.kernels.products import back, back_through_gelu, linear, linear_gelu
from gptforge.model import GPT, IGNORE, Block
from gptforge.train.savings import NO_SAVINGS, Savings

ALIGNMENT = 64
"""Numbers: products are fastest into memory that begins at a round address."""


class Gradients:
    """The gradients of a model in one piece of memory, in the order in which they are made."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        starts, end = [], 0
        for group in groups:
            starts.append(end)
            end += -(-sum(p.numel() for p in group) // ALIGNMENT) * ALIGNMENT
        self.ends = [*starts[1:], end]
        """Where each group ends."""
        first = groups[0][0]
        self.flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        self._views: list[tuple[Tensor, Tensor]] = []
        for place, group in zip(starts, groups, strict=True):
            for parameter in group:
                view = self.flat[place : place + parameter.numel()].view_as(parameter)
                self._views.append((parameter, view))
                place += parameter.numel()

    def clear(self) -> None:
        """Set all to zero, and make them their parameters' gradients."""
        self.flat.zero_()
        for parameter, view in self._views:
            parameter.grad = view

    def side_by_side(self, *vectors: Tensor) -> Tensor:
        """One tensor over the gradients of parameters that follow each other in a group."""
        places = [view for p in vectors for parameter, view in self._views if parameter is p]
        start, size = places[0].storage_offset(), sum(p.numel() for p in places)
        assert places[-1].storage_offset() + places[-1].numel() == start + size
        return self.flat[start : start + size]


class _Linear:
    """A linear layer: a narrow copy of its weights to compute with, and where gradients go."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.narrow = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)  # (out, in)
        self.narrow_bias = torch.empty_like(layer.bias, dtype=dtype, requires_grad=False)  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        return linear(x, self.narrow, self.narrow_bias)

    def forward_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its GELU."""
        return linear_gelu(x, self.narrow, self.narrow_bias)

    def backward(self, x: Tensor, upstream: Tensor) -> Tensor:
        """The gradient of x; that of the weights is added to theirs, that of the bias is not."""
        _add_product(self.weight, upstream, x)
        return back(upstream, self.narrow)


class _Kept(NamedTuple):
    """What a block's way back needs from its way forward: 12 or 16 C numbers a token in all."""

    norm_1: Norm
    normal_1: Tensor
    mixed: Tensor
    attention: Kept
    norm_2: Norm
    normal_2: Tensor
    inner: Tensor
    activated: Tensor | None
    dropped_1: Tensor | None
    dropped_2: Tensor | None


class _Block:
    """A transformer block. `before` is the bias of what the block in front of it adds last.

    With `keeps_gelu` the GELU's output is kept, and its slope is taken by the product that makes
    its gradient. Otherwise a pass of its own takes the slope, and makes the output again.
    """

    sums_1: Tensor
    sums_2: Tensor
    """Where the gradients of `vectors_1` and `vectors_2` are added up."""

    def __init__(
        self,
        block: Block,
        before: Tensor | None,
        dtype: torch.dtype,
        *,
        keeps_gelu: bool,
        flash4: bool,
    ) -> None:
        self._keeps_gelu = keeps_gelu
        self._attention: PackedAttention
        self._attention = ByFlash4() if flash4 else ByTorch(block.attn.dropout)
        self.n_head, self.dropout = block.attn.n_head, block.attn.dropout
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.c_attn = _Linear(block.attn.c_attn, dtype)
        self.mix = _Linear(block.attn.c_proj, dtype)
        self.c_fc = _Linear(block.mlp.c_fc, dtype)
        self.c_proj = _Linear(block.mlp.c_proj, dtype)
        self.linears = (self.c_attn, self.mix, self.c_fc, self.c_proj)
        self.vectors_1: list[Tensor] = [self.ln_1.weight, self.ln_1.bias]
        self.vectors_2: list[Tensor] = [self.ln_2.weight, self.ln_2.bias]
        # Whatever is added to the stream has the stream's gradient, and so has its bias: unless
        # dropout comes in between.
        self.apart: list[Tensor] = [self.mix.bias, self.c_proj.bias] if self.dropout else []
        if not self.dropout:
            self.vectors_2.append(self.mix.bias)
            if before is not None:
                self.vectors_1.append(before)

    def groups(self) -> list[list[Tensor]]:
        """The parameters in the order in which their gradients are made."""
        return [
            [self.c_proj.weight], [self.c_fc.bias], [self.c_fc.weight], self.vectors_2,
            [self.mix.weight], [self.c_attn.bias], [self.c_attn.weight], self.vectors_1,
            *([bias] for bias in self.apart),
        ]  # fmt: skip

    def forward(self, stream: Tensor, branch: Tensor | None, length: int) -> tuple[Tensor, _Kept]:
        """The block's last branch (N, C), not yet added to the stream, which is among the kept."""
        normal_1, norm_1 = add_norm(stream, branch, self.ln_1.weight, self.ln_1.bias)
        qkv = self.c_attn.forward(normal_1).view(-1, length, 3, self.n_head, self._head_size)
        mixed, attention = self._attention.forward(qkv)  # (N, C)
        branch, dropped_1 = _drop(self.mix.forward(mixed), self.dropout)
        normal_2, norm_2 = add_norm(norm_1.stream, branch, self.ln_2.weight, self.ln_2.bias)
        inner, activated = linear_gelu(
            normal_2, self.c_fc.narrow, self.c_fc.narrow_bias
        )  # (N, 4 C)
        branch, dropped_2 = _drop(self.c_proj.forward(activated), self.dropout)
        kept_gelu = activated if self._keeps_gelu else None
        return branch, _Kept(
            norm_1, normal_1, mixed, attention, norm_2, normal_2, inner, kept_gelu,
            dropped_1, dropped_2,
        )  # fmt: skip

    def backward(self, upstream: Tensor, kept: _Kept) -> Tensor:
        """From the gradient of the stream behind the block (N, C) to that before it."""
        to_branch = self._undrop(upstream, kept.dropped_2, self.c_proj.bias)
        wide = self._behind_c_fc(to_branch, kept)  # (N, 4 C)
        narrow = self.c_fc.backward(kept.normal_2, wide)
        upstream = norm_backward(narrow, kept.norm_2, self.ln_2.weight, upstream, self.sums_2)
        to_branch = self._undrop(upstream, kept.dropped_1, self.mix.bias)
        narrow = self.mix.backward(kept.mixed, to_branch)
        to_bias = _gradient(self.c_attn.bias)
        wide = self._attention.backward(narrow, kept.attention, to_bias)  # (N, 3 C)
        narrow = self.c_attn.backward(kept.normal_1, wide)
        return norm_backward(narrow, kept.norm_1, self.ln_1.weight, upstream, self.sums_1)

    def _behind_c_fc(self, to_branch: Tensor, kept: _Kept) -> Tensor:
        """The gradient of what c_fc gives; adds those of its bias and of c_proj's weights."""
        to_bias = _gradient(self.c_fc.bias)
        if kept.activated is None:
            wide = back(to_branch, self.c_proj.narrow)
            wide, activated = gelu_backward(kept.inner, wide, to_bias)
        else:
            wide = back_through_gelu(to_branch, self.c_proj.narrow, kept.inner)
            activated = kept.activated
            add_column_sums(wide, to_bias)
        _add_product(self.c_proj.weight, to_branch, activated)
        return wide

    def _undrop(self, upstream: Tensor, dropped: Tensor | None, bias: Tensor) -> Tensor:
        if dropped is None:
            return upstream
        upstream = _drop_backward(upstream, dropped, self.dropout)
        _gradient(bias).add_(upstream.sum(0, dtype=bias.dtype))
        return upstream

    @property
    def _head_size(self) -> int:
        return self.c_attn.weight.size(1) // self.n_head


class ByHand:
    """A GPT's loss and gradients, computed in `dtype` from its float32 weights.

    Args:
        model: whose parameters get the gradients.
        dtype: of the products and of the residual stream.
        savings: what to make again on the way back.
        flash4: whether attention's way back is FlashAttention-4's.
    """

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        savings: Savings = NO_SAVINGS,
        flash4: bool = False,
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
        self._blocks: list[_Block] = []
        before = None
        for number, block in enumerate(model.blocks()):
            assert isinstance(block, Block)
            # One block's worth is no matter.
            keeps_gelu = savings.recompute or number % KEEPS_GELU_EVERY == 0
            one = _Block(block, before, dtype, keeps_gelu=keeps_gelu, flash4=flash4)
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
        x, dropped = _drop(x.flatten(0, 1), self._dropout)
        stream, branch = x.to(self._dtype), None  # (N, C)
        kept: list[_Kept | Tensor] = []
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
            wide = _drop_backward(wide, dropped, self._dropout)
        _gradient(self._wpe)[:length] += wide.view(count, length, -1).sum(0)
        _gradient(self._wte).index_add_(0, idx.flatten(), wide)
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
            _add_product(self._wte, logits, normal[piece])
            del logits
        return torch.stack(losses).sum(), upstream


def _drop(x: Tensor, dropout: float) -> tuple[Tensor, Tensor | None]:
    """x with some of it dropped, and what was not."""
    return torch.native_dropout(x, dropout, True) if dropout else (x, None)


def _drop_backward(upstream: Tensor, dropped: Tensor, dropout: float) -> Tensor:
    result: Tensor = torch.ops.aten.native_dropout_backward(upstream, dropped, 1 / (1 - dropout))
    return result


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "begin() comes first"
    return parameter.grad


def _add_product(weight: Tensor, upstream: Tensor, x: Tensor) -> None:
    """Add upstream.T (out, N) @ x (N, in) to the gradient of a weight (out, in), in its type."""
    gradient = _gradient(weight)
    if x.is_cuda and x.dtype != gradient.dtype:
        # Summed in float32 inside the product, and never rounded to the factors' type.
        torch.addmm(gradient, upstream.t(), x, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient += upstream.t() @ x
