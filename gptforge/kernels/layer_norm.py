"""Residual addition and LayerNorm in one pass, forward and backward.

`residual += dropout(x); out = layer_norm(residual)` is one Triton kernel, and so is its backward,
which also sums up the gradients of weight, bias and the bias of the linear layer that computed `x`.
torch.compile fuses as much, but takes half a minute to start, and sums bias gradients in separate
kernels.

Shapes: N tokens, C channels.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, apply_dropout, dropout_kernel_args
from gptforge.kernels.float8 import saturate
from gptforge.kernels.launch import next_power_of_2, num_sms, tile_shape, uses_triton
from gptforge.kernels.reductions import Pending, accumulate_partials

EPS = 1e-5


class SavedLayerNorm(NamedTuple):
    """What the backward pass needs."""

    residual: Tensor
    """(N, C), the input of the LayerNorm."""
    mean: Tensor
    """(N,) float32."""
    rstd: Tensor
    """(N,) float32, 1 / standard deviation."""
    dropout: DropoutSeed | None = None
    """Dropout of `x`; without `x`, that of the residual (the embedding)."""


def add_layer_norm(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout: DropoutSeed | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, SavedLayerNorm]:
    """LayerNorm of residual + dropout(x); the sum is the new residual and overwrites `x`.

    Args:
        residual: (N, C).
        x: (N, C) output of the previous sublayer, or None.
        weight: (C,) float32, as is `bias`.
        dropout: of `x`. Without `x`, the dropout that made the residual; only the backward uses it.
        out_dtype: of the normalized tensor, such as fp8; by default that of the residual.

    Returns:
        The normalized tensor (N, C), and the saved tensors, which include the new residual.
    """
    if not uses_triton(residual):
        if x is not None:
            residual = x.copy_(apply_dropout(dropout, x.to(weight.dtype)) + residual)
        fp32 = residual.to(weight.dtype)
        mean = fp32.mean(1)
        rstd = (fp32.var(1, correction=0) + EPS).rsqrt()
        x_hat = (fp32 - mean[:, None]) * rstd[:, None]
        saved = SavedLayerNorm(residual, mean, rstd, dropout)
        return saturate(x_hat * weight + bias, out_dtype or residual.dtype), saved
    from gptforge.kernels.triton import layer_norm as kernels

    rows, columns = residual.shape
    assert residual.is_contiguous() and (x is None or x.is_contiguous())
    out = torch.empty_like(residual, dtype=out_dtype)
    mean = torch.empty(rows, dtype=torch.float32, device=residual.device)
    rstd = torch.empty_like(mean)
    block, tile_rows = tile_shape(columns)
    seeds, has_dropout = dropout_kernel_args(dropout, mean)
    kernels.add_layer_norm[(math.ceil(rows / tile_rows),)](
        residual, residual if x is None else x, weight, bias, out, mean, rstd, seeds, rows, EPS,
        columns=columns, BLOCK=block, ROWS=tile_rows, HAS_X=x is not None, DROPOUT=has_dropout,
    )  # fmt: skip
    return out, SavedLayerNorm(residual if x is None else x, mean, rstd, dropout)


def layer_norm_backward(
    grad_output: Tensor,
    saved: SavedLayerNorm,
    weight: Tensor,
    grad_residual: Tensor | None,
    grads: Tensor,
    pending: Pending = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `residual` and `x`, (N, C) each, which are one tensor without dropout.

    That of `residual` overwrites `grad_output`.

    Args:
        grad_output: (N, C), of the LayerNorm's output.
        saved: from the forward pass.
        weight: (C,) float32.
        grad_residual: (N, C) gradient that reaches the new residual directly, or None.
        grads: (2 * C,) float32, to which the gradients of weight and bias are added; or (3 * C,),
            the last third for the bias of the linear layer that computed `x`.
        pending: defers these sums, to be finished with others.
    """
    if not uses_triton(grad_output):
        # With y = w * x_hat + b and x_hat = (x - mean) * rstd, as in llm.c's layernorm.cuh:
        # dx = rstd * (w * dy - mean(w * dy) - x_hat * mean(w * dy * x_hat)).
        x_hat = (saved.residual.to(weight.dtype) - saved.mean[:, None]) * saved.rstd[:, None]
        dy = grad_output.to(weight.dtype)
        sums = [(dy * x_hat).sum(0), dy.sum(0)]  # (C,) each
        dy = dy * weight
        dx = dy - dy.mean(1, keepdim=True) - x_hat * (dy * x_hat).mean(1, keepdim=True)
        dx = dx * saved.rstd[:, None]
        grad_output.copy_(dx if grad_residual is None else dx + grad_residual)
        grad_x = apply_dropout(saved.dropout, grad_output).to(grad_output.dtype)
        sums.append(grad_x.sum(0, dtype=weight.dtype))
        grads += torch.cat(sums)[: len(grads)]
        return grad_output, grad_x
    from gptforge.kernels.triton import layer_norm as kernels

    rows, columns = grad_output.shape
    assert grad_output.is_contiguous()
    assert grad_residual is None or grad_residual.is_contiguous()
    has_dropout = saved.dropout is not None
    block = next_power_of_2(columns)
    programs, tile_rows, stages = _backward_launch(rows, block, has_dropout, grad_output.device)
    partials = torch.empty(programs, 3 * columns, dtype=torch.float32, device=grad_output.device)
    grad_x = torch.empty_like(grad_output) if has_dropout else grad_output
    seeds, has_dropout = dropout_kernel_args(saved.dropout, partials)
    kernels.layer_norm_backward[(programs,)](
        grad_output, saved.residual, saved.mean, saved.rstd, weight,
        grad_output if grad_residual is None else grad_residual, grad_x, partials, seeds, rows,
        math.ceil(rows / (programs * tile_rows)), columns=columns, BLOCK=block, ROWS=tile_rows,
        HAS_GRAD_RESIDUAL=grad_residual is not None, DROPOUT=has_dropout, STAGES=stages,
        num_warps=block // 1024 or 1,
    )  # fmt: skip
    accumulate_partials(partials, grads, pending)
    return grad_output, grad_x


def _backward_launch(
    rows: int, block: int, has_dropout: bool, device: torch.device
) -> tuple[int, int, int]:
    """Programs, rows of a tile and pipeline stages of the backward, measured on an H100.

    Each thread keeps three sums for each of its columns in registers, so tiles have few rows, and
    the next ones are prefetched meanwhile.
    """
    if block <= 512:
        stages, tile, programs_per_sm = 4, 512 if has_dropout else 1024, 8
    else:
        stages, tile, programs_per_sm = 3 if block <= 2048 else 1, 512, 6 if has_dropout else 8
    programs = min(programs_per_sm * num_sms(device), math.ceil(rows / 16))
    return programs, max(1, tile // block), stages
