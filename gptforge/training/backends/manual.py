"""Loss and gradients of a GPT by a manual backward, without autograd.

After llm.c (Karpathy et al., 2024). It does three things that autograd and torch.compile do not:
GEMMs accumulate weight gradients in the fp32 buffer, without a bf16 gradient in between;
activations are overwritten after their last use; and nothing is compiled but Triton kernels, which
are in `gptforge.kernels`. Tests compare this backend with `GPT.forward` and autograd.

Shapes: B sequences of T tokens, N = B * T, C channels, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gptforge.estimate.formulas import default_loss_chunk, gelu_save_interval
from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.distillation import distillation_in_place
from gptforge.kernels.dropout import DropoutRate, DropoutSeed
from gptforge.kernels.embedding import embedding, embedding_backward
from gptforge.kernels.layer_norm import SavedLayerNorm
from gptforge.kernels.matmul import accumulate_wgrad, linear
from gptforge.model import GPT
from gptforge.training.backends.manual_layers import (
    GROUPS_PER_BLOCK,
    BlockDropout,
    ComputeWeights,
    ManualBlock,
    ManualLayerNorm,
    SavedActivations,
    grad_groups,
)
from gptforge.training.distillation import Distillation
from gptforge.training.grad_buffer import GradBuffer

MAX_ONE_HOT_VOCAB = 1024
"""Up to this vocabulary size, the token embedding's gradient is a GEMM with one-hot rows."""


class ManualHead:
    """The output layer, whose weight is the token embedding, and the loss."""

    def __init__(self, wte: Tensor, weights: ComputeWeights, grads: GradBuffer) -> None:
        self.weight_grad = grads.view(wte)
        self._compute_weight = weights.compute_copy(wte)  # (V, C)

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, C) -> logits (n, V)."""
        return linear(hidden, self._compute_weight)

    def forward_backward(
        self,
        hidden: Tensor,
        targets: Tensor,
        scale: float | Tensor,
        grad_hidden: Tensor,
        teacher_logits: Sequence[Tensor],
        distill_weight: float,
    ) -> Tensor:
        """Compute the losses (n,), and accumulate the weight's gradient times `scale`.

        Args:
            hidden: (n, C).
            targets: (n,) token ids.
            scale: of the gradients, see `ManualBackend.forward_backward`.
            grad_hidden: (n, C), gets the gradient of `hidden`.
            teacher_logits: (n, V) of each teacher.
            distill_weight: weight of the teachers in the loss.
        """
        logits = self.forward(hidden)  # overwritten by their gradient
        losses = loss_in_place(logits, targets, scale, teacher_logits, distill_weight)
        torch.mm(logits, self._compute_weight, out=grad_hidden)
        accumulate_wgrad(self.weight_grad, logits, hidden)
        return losses


def loss_in_place(
    logits: Tensor,
    targets: Tensor,
    scale: float | Tensor,
    teacher_logits: Sequence[Tensor],
    distill_weight: float,
) -> Tensor:
    """Losses (n,); the logits (n, V) become their gradient. See `ManualHead.forward_backward`."""
    if not teacher_logits:
        return cross_entropy_in_place(logits, targets, scale)
    return distillation_in_place(
        logits, torch.stack(list(teacher_logits)), targets, weight=distill_weight, scale=scale
    )


class ManualBackend:
    """Computes in `dtype` with fp32 master weights and fp32 gradients.

    Args:
        model: its parameters get the gradients.
        dtype: compute dtype of the GEMMs, and dtype of the residual.
        activation_checkpointing: save only each block's input, and recompute the rest.
        loss_chunk: tokens whose logits are in memory at a time; 0 for the fastest number.
        weights: allocates the weights to compute with; by default for an unsharded model.
        make_grads: builds the gradient buffer from groups of parameters.
        distillation: teachers to learn from besides the targets.
    """

    name = "manual backward"
    block_class: type[ManualBlock] = ManualBlock
    head_class: type[ManualHead] = ManualHead
    loss_chunk_share = 1.0
    """Tokens in a chunk of the loss, relative to the default."""

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        activation_checkpointing: bool = False,
        loss_chunk: int = 0,
        weights: ComputeWeights | None = None,
        make_grads: Callable[[list[list[Tensor]]], GradBuffer] = GradBuffer,
        distillation: Distillation | None = None,
    ) -> None:
        p, device = model.config.dropout, next(model.parameters()).device
        self._dropout = DropoutRate(p, device) if p else None
        # SDPA with dropout would draw a different mask when it is recomputed.
        assert not (self._dropout and activation_checkpointing), "cannot recompute dropout"
        assert model.config.activation == "gelu_tanh", "the manual backward has no exact GELU"
        self.model = model
        self._recompute = activation_checkpointing
        chunk = default_loss_chunk(model.config.vocab_size)
        self._loss_chunk = loss_chunk or int(chunk * self.loss_chunk_share)
        self._weights = weights = weights or ComputeWeights(dtype)
        wte, wpe, ln_f = (model.transformer[name] for name in ("wte", "wpe", "ln_f"))
        assert isinstance(wte, nn.Embedding) and isinstance(wpe, nn.Embedding)
        assert isinstance(ln_f, nn.LayerNorm)
        self._wte, self._wpe = weights.master(wte.weight), weights.master(wpe.weight)
        self.grads = grads = make_grads(grad_groups(model))
        # Tied to the embedding, whose lookup reads fp32: the sum with wpe is rounded once.
        self._head = self.head_class(wte.weight, weights, grads)
        self._dwte, self._dwpe = grads.view(wte.weight), grads.view(wpe.weight)
        self._blocks: list[ManualBlock] = []
        prev_bias: Tensor | None = None  # of the matmul before: the next LayerNorm adds it
        interval = gelu_save_interval(model.config.n_embd)
        for i, block in enumerate(model.blocks()):
            # With checkpointing only one block's activations exist at a time, so save the GELU too.
            save_gelu = activation_checkpointing or i % interval == 0
            self._blocks.append(
                self.block_class(block, prev_bias, weights, grads, save_gelu=save_gelu)
            )
            prev_bias = block.mlp.c_proj.bias
        self._ln_f = ManualLayerNorm(ln_f, prev_bias, weights, grads)
        distillation = distillation or Distillation(teachers=(), weight=0.0)
        self._distill_weight = distillation.weight
        # Their forward runs with the same kernels; gradients on the meta device take no memory.
        no_grads = functools.partial(GradBuffer, device="meta")
        self._teachers = [
            ManualBackend(teacher, dtype, make_grads=no_grads) for teacher in distillation.teachers
        ]
        for teacher in self._teachers:
            teacher._weights.refresh()  # they never change, so one copy is enough
        self.on_grads_ready: Callable[[int], None] = lambda num_groups: None
        """Called with the number of leading groups that are final for this micro-batch."""

    def set_dropout(self, p: float) -> None:
        """Change the dropout probability; a model without dropout stays without."""
        if self._dropout is not None:
            self._dropout.set(p)

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Start a step: zero the gradients, and copy the weights to the compute dtype."""
        self.grads.zero_()
        self._weights.refresh()

    @torch.no_grad()
    def forward_backward(self, idx: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        """Compute the summed loss of a micro-batch, and accumulate its gradients times `scale`.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) next token ids; IGNORE_INDEX where there is none.
            scale: usually 1 / tokens of a step. As an fp32 scalar on the device it may change
                between replays of a CUDA graph.
        """
        teachers_out = [teacher.forward(idx)[0] for teacher in self._teachers]  # (N, C) each
        saved: list[SavedActivations | Tensor] = []
        ln_f_out, ln_f = self.forward(idx, saved)
        # Forward and backward of the head in one go: the logits are never saved.
        loss, dln_f = self._lm_head(ln_f_out, targets.flatten(), scale, teachers_out)
        dresidual, dmlp_out = self._ln_f.backward(dln_f, ln_f, None)  # (N, C) each
        num_ready = 1  # the group of ln_f, see `grad_groups`
        for block in reversed(self._blocks):
            item = saved.pop()
            if isinstance(item, Tensor):  # checkpointed: only the block's input was saved
                _, item = block.forward(item, None, idx.size(1), BlockDropout())
            dresidual, dmlp_out = block.backward(dresidual, dmlp_out, item)
            del item
            num_ready += GROUPS_PER_BLOCK
            self.on_grads_ready(num_ready)
        # Before the first block there is no `mlp_out`: this is the gradient of the embedding before
        # dropout. The embeddings' groups are the last ones, which the reducer's `finish` sends.
        self._embedding_backward(dmlp_out, idx)
        return loss

    @torch.no_grad()
    def forward(
        self, idx: Tensor, saved: list[SavedActivations | Tensor] | None = None
    ) -> tuple[Tensor, SavedLayerNorm]:
        """Compute the output (N, C) of the last LayerNorm, which the output layer reads.

        Args:
            idx: (B, T) token ids.
            saved: gets what the backward of each block needs.
        """
        seq_len = idx.size(1)
        # One for the embedding; in each block one for attention, and one for each sublayer.
        num_seeds = 1 + 3 * len(self._blocks)
        seeds: list[DropoutSeed | None] = [None] * num_seeds
        if self._dropout is not None:
            seeds = [*self._dropout.draw_seeds(num_seeds)]  # all at once, by one kernel

        residual = embedding(idx, self._wte, self._wpe, self._weights.dtype, seeds[0])  # (N, C)
        mlp_out = None  # (N, C), added to the residual by the next LayerNorm's kernel
        for i, block in enumerate(self._blocks):
            dropout = BlockDropout(*seeds[3 * i : 3 * i + 3])
            mlp_out, activations = block.forward(residual, mlp_out, seq_len, dropout)
            residual = activations.ln_2.residual
            if saved is not None:
                saved.append(activations.ln_1.residual if self._recompute else activations)
            del activations  # frees memory unless it is saved
        return self._ln_f.forward(residual, mlp_out, seeds[-1])

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the global norm to `max_norm`; returns the norm before clipping."""
        return self.grads.clip_grad_norm_(max_norm)

    def _lm_head(
        self,
        ln_f_out: Tensor,
        targets: Tensor,
        scale: float | Tensor,
        teachers_out: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Output layer and loss in chunks: the summed loss, and the gradient of `ln_f_out`."""
        dln_f = torch.empty_like(ln_f_out)
        losses = []
        for start in range(0, len(ln_f_out), self._loss_chunk):
            chunk = slice(start, start + self._loss_chunk)
            # The logits are freed before those of the next chunk are allocated.
            teacher_logits = [
                teacher._head.forward(out[chunk])
                for teacher, out in zip(self._teachers, teachers_out, strict=True)
            ]
            loss = self._head.forward_backward(
                ln_f_out[chunk], targets[chunk], scale, dln_f[chunk], teacher_logits,
                self._distill_weight,
            )  # fmt: skip
            losses.append(loss.sum())
        return torch.stack(losses).sum(), dln_f

    def _embedding_backward(self, dx: Tensor, idx: Tensor) -> None:
        """Accumulate the gradients of both embeddings from that of their sum (N, C)."""
        tokens = idx.flatten()
        self._dwpe[: idx.size(1)] += dx.view(*idx.shape, -1).sum(0, dtype=self._dwte.dtype)
        vocab_size = len(self._dwte)
        if vocab_size <= MAX_ONE_HOT_VOCAB:
            # Atomics of many tokens contend for few rows, and a GEMM is deterministic. The one-hot
            # matrix is exact in bf16, and small: (N, V).
            one_hot = dx.new_zeros(len(tokens), vocab_size).scatter_(1, tokens[:, None], 1)
            accumulate_wgrad(self._dwte, one_hot, dx)
        else:
            embedding_backward(dx, tokens, self._dwte)
