"""The manual backward with matmuls in fp8.

Only the inputs of matmuls change: activations and weights are rounded to E4M3, gradients to E5M2.
The residual, LayerNorm, attention's softmax, the logits, the loss, weight gradients and master
weights stay as in `manual.py`, and so do the outputs of matmuls. (With logits from fp8 the loss is
0.015 above bfloat16's after 300 steps, and the difference grows.) The kernels that compute an input
write it in fp8 where they can; `kernels.float8` casts the others.

Each tensor has one scale, and none depends on earlier steps. Weights are scaled by their current
maximum, once a step. Activations need no scale: E4M3 holds 0.002 to 448. Gradients are scaled
by a constant: per token they are about 1e-5 to 10, and E5M2 has 32 binary orders of magnitude.

Shapes: see `manual_layers.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gptforge.kernels.cross_entropy import cross_entropy_in_place
from gptforge.kernels.float8 import (
    E4M3,
    E5M2,
    Float8Tensor,
    cast_transpose,
    empty_float8,
    gelu_backward_cast_transpose,
    transpose,
    unit_scale,
)
from gptforge.kernels.float8_matmul import accumulate_float8_wgrad, float8_dgrad, float8_linear
from gptforge.kernels.reductions import PendingReductions
from gptforge.model import GPT
from gptforge.training.backends.manual import ManualBackend, ManualHead, loss_in_place
from gptforge.training.backends.manual_layers import (
    BlockDropout,
    ComputeWeights,
    ManualBlock,
    ManualLinear,
    SavedActivations,
)
from gptforge.training.grad_buffer import GradBuffer

GRAD_SCALE = 2.0**10
"""Factor of a token's gradient (before 1 / tokens): E5M2 then holds magnitudes of 1.5e-8 to 56."""
LOGITS_GRAD_SCALE = 2.0**15
"""The same for logits, whose gradients are at most 1."""


class Float8Weights(ComputeWeights):
    """Weights in fp8 besides those of another `ComputeWeights`, and the scales of gradients."""

    def __init__(self, weights: ComputeWeights, device: torch.device) -> None:
        super().__init__(weights.dtype)
        self.ln_out_dtype = E4M3
        self._weights = weights
        self._float8: list[Float8Tensor] = []
        self._float8_sources: list[Tensor] = []
        scales = torch.tensor([[1 / GRAD_SCALE], [1 / LOGITS_GRAD_SCALE]], device=device)
        # Rows of 16 bytes: Triton compiles other code for unaligned pointers.
        self._unscaled = scales.expand(2, 4).contiguous()
        self._scale_invs = torch.ones_like(self._unscaled)
        self.grad_scale_inv, self.logits_grad_scale_inv = self._scale_invs[:, 0]

    @override
    def master(self, parameter: Tensor) -> Tensor:
        return self._weights.master(parameter)

    @override
    def compute_copy(self, parameter: Tensor) -> Tensor:
        return self._weights.compute_copy(parameter)

    def float8_copy(self, parameter: Tensor) -> Float8Tensor:
        """Allocate the fp8 copy of a matrix; call this once per parameter."""
        source = self._weights.full(parameter)
        scale_inv = torch.ones((), device=source.device)
        self._float8.append(empty_float8(source, E4M3, scale_inv))
        self._float8_sources.append(source)
        return self._float8[-1]

    @override
    def refresh(self) -> None:
        self._weights.refresh()
        self._weights.wait_for(*self._float8_sources)
        amaxes = torch._foreach_norm(self._float8_sources, torch.inf)
        torch._foreach_clamp_min_(amaxes, 1e-30)  # for weights of zero
        torch._foreach_div_(amaxes, torch.finfo(E4M3).max)
        torch._foreach_copy_([copy.scale_inv for copy in self._float8], amaxes)
        for source, copy in zip(self._float8_sources, self._float8, strict=True):
            cast_transpose(source, copy)

    def set_grad_scale(self, scale: float | Tensor) -> None:
        """Set the scales of gradients that are multiplied by `scale`."""
        torch.mul(self._unscaled, scale, out=self._scale_invs)


class Float8Linear(ManualLinear):
    """A linear layer with matmuls in fp8."""

    def __init__(self, layer: nn.Linear, weights: ComputeWeights, grads: GradBuffer) -> None:
        assert isinstance(weights, Float8Weights)
        self.weight_grad, self.bias_grad = grads.view(layer.weight), grads.view(layer.bias)
        self._weight = weights.float8_copy(layer.weight)
        self._bias = weights.compute_copy(layer.bias)
        self.grad_scale_inv = weights.grad_scale_inv

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(N, in) in fp8 -> (N, out)."""
        return float8_linear(x, self._weight, self._bias)

    @override
    def backward(self, x: Tensor, grad_output: Tensor) -> Tensor:
        """As `ManualLinear.backward`, with the transpose (in, N) of `x` in fp8."""
        grad = empty_float8(grad_output, E5M2, self.grad_scale_inv)
        return self.backward_float8(x, cast_transpose(grad_output, grad))

    def backward_float8(self, x_t: Tensor, grad_output: Float8Tensor) -> Tensor:
        """`backward` with a gradient that is in fp8 already."""
        accumulate_float8_wgrad(self.weight_grad, grad_output, x_t)
        return float8_dgrad(grad_output, self._weight)


class Float8Head(ManualHead):
    """The output layer with its backward in fp8, and the loss."""

    def __init__(self, wte: Tensor, weights: ComputeWeights, grads: GradBuffer) -> None:
        assert isinstance(weights, Float8Weights)
        super().__init__(wte, weights, grads)
        self._weight = weights.float8_copy(wte)  # (V, C)
        self._grad_scale_inv = weights.logits_grad_scale_inv

    @override
    def forward_backward(
        self,
        hidden: Tensor,
        targets: Tensor,
        scale: float | Tensor,
        grad_hidden: Tensor,
        teacher_logits: Sequence[Tensor],
        distill_weight: float,
    ) -> Tensor:
        """See `ManualHead.forward_backward`."""
        logits = self.forward(hidden)
        if teacher_logits:
            args = (targets, LOGITS_GRAD_SCALE, teacher_logits, distill_weight)
            losses = loss_in_place(logits, *args)
            # The loss is scaled by LOGITS_GRAD_SCALE already, so the cast must not scale again.
            out = empty_float8(logits, E5M2, unit_scale(logits.device))
            grad = cast_transpose(logits, out)
        else:
            data = torch.empty_like(logits, dtype=E5M2)
            losses = cross_entropy_in_place(logits, targets, LOGITS_GRAD_SCALE, data)
            del logits
            grad = Float8Tensor(data, transpose(data), self._grad_scale_inv)
        grad = grad._replace(scale_inv=self._grad_scale_inv)
        float8_dgrad(grad, self._weight, out=grad_hidden)
        accumulate_float8_wgrad(self.weight_grad, grad, _cast_activation(hidden).transpose)
        return losses


class Float8Block(ManualBlock):
    """A transformer block with matmuls in fp8.

    Activations that the backward needs only for weight gradients are saved as fp8 transposes
    (C or 4C, N).
    """

    linear_class = Float8Linear

    @override
    def forward(
        self, residual: Tensor, mlp_out: Tensor | None, seq_len: int, dropout: BlockDropout
    ) -> tuple[Tensor, SavedActivations]:
        ln_1_out, ln_1 = self.ln_1.forward(residual, mlp_out, dropout.residual)  # (N, C)
        ln_1_out_t = transpose(ln_1_out)  # while it is in the L2 cache
        qkv = self.c_attn.forward(ln_1_out).view(-1, seq_len, 3, self._n_head, self._head_size)
        atty, attn = self._attention.forward(qkv, dropout.attn_probs)  # (N, C)
        atty_fp8 = _cast_activation(atty)
        attn_out = self.attn_proj.forward(atty_fp8.data)  # (N, C)
        # Overwrites `attn_out` with the new residual.
        ln_2_out, ln_2 = self.ln_2.forward(ln_1.residual, attn_out, dropout.attn_output)  # (N, C)
        ln_2_out_t = transpose(ln_2_out)
        fch = self.c_fc.forward(ln_2_out)  # (N, 4C)
        fch_gelu = _cast_activation(fch, gelu=True)  # (N, 4C)
        mlp_out = self.mlp_proj.forward(fch_gelu.data)  # (N, C)
        return mlp_out, SavedActivations(
            ln_1, ln_1_out_t, atty_fp8.transpose, attn, ln_2, ln_2_out_t, fch, fch_gelu.transpose
        )

    @override
    def backward(
        self, dresidual: Tensor, dmlp_out: Tensor, saved: SavedActivations
    ) -> tuple[Tensor, Tensor]:
        assert saved.fch_gelu is not None and isinstance(self.c_fc, Float8Linear)
        pending = PendingReductions()
        dfch_gelu = self.mlp_proj.backward(saved.fch_gelu, dmlp_out)  # (N, 4C)
        dfch = empty_float8(dfch_gelu, E5M2, self.c_fc.grad_scale_inv)
        gelu_backward_cast_transpose(saved.fch, dfch_gelu, dfch, self.c_fc.bias_grad, pending)
        dln_2 = self.c_fc.backward_float8(saved.ln_2_out, dfch)  # (N, C)
        dresidual, dattn_out = self.ln_2.backward(dln_2, saved.ln_2, dresidual, pending)
        datty = self.attn_proj.backward(saved.atty, dattn_out)  # (N, C)
        dqkv = self._attention.backward(datty, saved.attn, self.c_attn.bias_grad, pending)
        dln_1 = self.c_attn.backward(saved.ln_1_out, dqkv)  # (N, C)
        dresidual, dmlp_out = self.ln_1.backward(dln_1, saved.ln_1, dresidual, pending)
        pending.flush()
        return dresidual, dmlp_out


class Float8Backend(ManualBackend):
    """A `ManualBackend` with matmuls in fp8; `dtype` is that of the rest."""

    name = "manual backward, fp8"
    block_class, head_class = Float8Block, Float8Head
    loss_chunk_share = 0.75  # the logits and their gradient in fp8 are in memory at once

    def __init__(
        self,
        model: GPT,
        dtype: torch.dtype,
        *,
        weights: ComputeWeights | None = None,
        **options: Any,
    ) -> None:
        float8 = Float8Weights(weights or ComputeWeights(dtype), model.lm_head.weight.device)
        super().__init__(model, dtype, weights=float8, **options)
        self._ln_f.out_dtype = dtype
        self._set_grad_scale = float8.set_grad_scale

    @override
    @torch.no_grad()
    def forward_backward(self, idx: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        self._set_grad_scale(scale)
        return super().forward_backward(idx, targets, scale)


def _cast_activation(x: Tensor, *, gelu: bool = False) -> Float8Tensor:
    return cast_transpose(x, empty_float8(x, E4M3, unit_scale(x.device)), gelu=gelu)
