"""The pieces of a block between its matrix products, each in one pass over memory.

On a CUDA device they are Triton kernels, elsewhere the plain torch that they are tested against.
torch's compiler fuses as much, but takes half a minute to start, and leaves the sums for the
biases' gradients as passes of their own.

They write where their input was if it is not needed again, as the docstrings say. Gradients of
vectors are not returned but added, in float32, to what is in `sums`: at once, or with others, if
they may stay `unfinished` (sums.py). Where numbers are dropped, it happens on the way (dropout.py).

Shapes: N tokens, C channels.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, apply_dropout, dropout_kernel_args
from gptforge.kernels.launch import num_sms, tile_shape
from gptforge.kernels.reductions import PendingReductions, accumulate_partials

EPS = 1e-5
"""LayerNorm's."""


class SavedLayerNorm(NamedTuple):
    """What the way back through a LayerNorm needs."""

    residual: Tensor
    """(N, C), what was normalised."""
    mean: Tensor
    """(N,) float32."""
    rstd: Tensor
    """(N,) float32: one over the standard deviation."""
    dropout: DropoutSeed | None = None
    """What was dropped from the branch; or from the stream, if nothing was added to it."""


def add_layer_norm(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dropout: DropoutSeed | None = None,
) -> tuple[Tensor, SavedLayerNorm]:
    """LayerNorm of stream + branch: all (N, C), the last two (C,) float32.

    The sum, which is the stream from there on, takes the branch's place. `drop` is for the branch;
    where there is none, it says what was dropped from the stream before.
    """
    if residual.is_cuda:
        return _add_layer_norm_cuda(residual, x, weight, bias, dropout)
    if x is not None:
        residual = x.copy_(apply_dropout(dropout, x.to(weight.dtype)) + residual)
    wide = residual.to(weight.dtype)
    mean = wide.mean(1)
    rstd = (wide.var(1, correction=0) + EPS).rsqrt()
    normal = (wide - mean[:, None]) * rstd[:, None]
    return (normal * weight + bias).to(residual.dtype), SavedLayerNorm(
        residual, mean, rstd, dropout
    )


def layer_norm_backward(
    grad_output: Tensor,
    saved: SavedLayerNorm,
    weight: Tensor,
    grad_residual: Tensor | None,
    grads: Tensor,
    pending: PendingReductions | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of stream and branch, (N, C) each; one and the same if nothing was dropped.

    That of the stream takes `upstream`'s place.

    Args:
        upstream: (N, C) gradient of the LayerNorm's output.
        norm: from the way forward.
        weight: (C,) float32.
        beside: (N, C) gradient that reaches the stream past the LayerNorm, or None.
        sums: (2 * C,) for the gradients of weight and bias; or (3 * C,), where the last third is
            for the bias of the branch that was added, whose gradient is the branch's.
        unfinished: where the sums may wait for others, if they may.
    """
    if grad_output.is_cuda:
        return _layer_norm_backward_cuda(grad_output, saved, weight, grad_residual, grads, pending)
    normal = (saved.residual.to(weight.dtype) - saved.mean[:, None]) * saved.rstd[:, None]
    wide = grad_output.to(weight.dtype)
    parts = [(wide * normal).sum(0), wide.sum(0)]
    wide = wide * weight
    wide = wide - wide.mean(1, keepdim=True) - normal * (wide * normal).mean(1, keepdim=True)
    wide = wide * saved.rstd[:, None]
    grad_output.copy_(wide if grad_residual is None else wide + grad_residual)
    to_branch = apply_dropout(saved.dropout, grad_output).to(grad_output.dtype)
    parts.append(to_branch.sum(0, dtype=weight.dtype))
    grads += torch.cat(parts)[: len(grads)]
    return grad_output, to_branch


def _add_layer_norm_cuda(
    stream: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, drop: DropoutSeed | None
) -> tuple[Tensor, SavedLayerNorm]:
    rows, columns = stream.shape
    assert stream.is_contiguous() and (branch is None or branch.is_contiguous())
    out = torch.empty_like(stream)
    mean = torch.empty(rows, dtype=torch.float32, device=stream.device)
    rstd = torch.empty_like(mean)
    block, height = tile_shape(columns)
    keys, dropped = dropout_kernel_args(drop, mean)
    _block_kernels().add_norm[(math.ceil(rows / height),)](
        stream, stream if branch is None else branch, weight, bias, out, mean, rstd,
        keys, rows, EPS, columns=columns, BLOCK=block, ROWS=height,
        HAS_BRANCH=branch is not None, DROPPED=dropped,
    )  # fmt: skip
    return out, SavedLayerNorm(stream if branch is None else branch, mean, rstd, drop)


def _layer_norm_backward_cuda(
    upstream: Tensor,
    norm: SavedLayerNorm,
    weight: Tensor,
    beside: Tensor | None,
    sums: Tensor,
    unfinished: PendingReductions | None,
) -> tuple[Tensor, Tensor]:
    rows, columns = upstream.shape
    assert upstream.is_contiguous() and (beside is None or beside.is_contiguous())
    block, _ = tile_shape(columns)
    # Each thread keeps three sums of each of its columns: few rows at a time, others on their way.
    is_small, drops = block <= 512, norm.dropout is not None
    stages = 1 if block > 2048 else 4 if is_small else 3
    height = (512 if drops or not is_small else 1024) // block or 1
    each = 8 if is_small or not drops else 6
    programs = min(each * num_sms(upstream.device), math.ceil(rows / 16))
    parts = torch.empty(programs, 3 * columns, dtype=torch.float32, device=upstream.device)
    to_branch = upstream if norm.dropout is None else torch.empty_like(upstream)
    keys, dropped = dropout_kernel_args(norm.dropout, parts)
    _block_kernels().norm_backward[(programs,)](
        upstream, norm.residual, norm.mean, norm.rstd, weight,
        upstream if beside is None else beside, to_branch, parts, keys, rows,
        math.ceil(rows / (programs * height)), columns=columns, BLOCK=block, ROWS=height,
        HAS_BESIDE=beside is not None, DROPPED=dropped, STAGES=stages,
        num_warps=block // 1024 or 1,
    )  # fmt: skip
    accumulate_partials(parts, sums, unfinished)
    return upstream, to_branch


def _block_kernels() -> Any:
    """The kernels; importing Triton takes a second, so it waits until here."""
    from gptforge.kernels import in_triton

    return in_triton
