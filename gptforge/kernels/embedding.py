"""Token plus position embedding, forward and backward (nanoGPT's `wte(idx) + wpe(pos)`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, apply_dropout, dropout_kernel_args
from gptforge.kernels.launch import tile_shape, uses_triton


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, dropout: DropoutSeed | None = None
) -> Tensor:
    """Add token and position embeddings: idx (B, T), wte (V, C), wpe (T or more, C) to (B * T, C).

    Dropout is applied to the sum, which is rounded once, to `dtype`.
    """
    length = idx.size(1)
    if not uses_triton(idx):
        x = (F.embedding(idx, wte) + wpe[:length]).flatten(0, 1)  # (B * T, C)
        return apply_dropout(dropout, x).to(dtype)
    from gptforge.kernels.triton import embedding as kernels

    assert wte.is_contiguous() and wpe.is_contiguous()
    rows, columns = idx.numel(), wte.size(1)
    out = torch.empty(rows, columns, dtype=dtype, device=idx.device)
    block, tile_rows = tile_shape(columns)
    seeds, has_dropout = dropout_kernel_args(dropout, idx)
    kernels.embedding[(math.ceil(rows / tile_rows),)](
        idx.contiguous(), wte, wpe, out, seeds, rows, length,
        columns=columns, BLOCK=block, ROWS=tile_rows, DROPOUT=has_dropout,
    )  # fmt: skip
    return out


def embedding_backward(grad_output: Tensor, idx: Tensor, weight_grad: Tensor) -> None:
    """Add each row of `grad_output` (N, C) to row idx[n] of `weight_grad` (V, C).

    On CUDA atomics add in varying order, so the last bits vary from run to run, unless
    `torch.use_deterministic_algorithms` is set.
    """
    if not uses_triton(idx) or torch.are_deterministic_algorithms_enabled():
        weight_grad.index_add_(0, idx, grad_output.to(weight_grad.dtype))
        return
    from gptforge.kernels.triton import embedding as kernels

    assert grad_output.is_contiguous() and idx.is_contiguous() and weight_grad.is_contiguous()
    rows, columns = grad_output.shape
    block, tile_rows = tile_shape(columns, numel=2048)
    kernels.embedding_backward[(math.ceil(rows / tile_rows),)](
        grad_output, idx, weight_grad, rows, columns=columns, BLOCK=block, ROWS=tile_rows
    )
