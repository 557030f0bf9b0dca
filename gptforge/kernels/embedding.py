"""TODO"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.dropout import DropoutSeed, apply_dropout, dropout_kernel_args
from gptforge.kernels.launch import tile_shape
from gptforge.kernels.layer_norm import _block_kernels


def embedding(
    idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype, dropout: DropoutSeed | None = None
) -> Tensor:
    """Rows of the token table and of the position table, added up: (B, T) ids to (B * T, C).

    The tables are (V, C) and (T or more, C), the sum is rounded once, to `dtype`.
    """
    length = idx.size(1)
    if not idx.is_cuda:
        return apply_dropout(dropout, (F.embedding(idx, wte) + wpe[:length]).flatten(0, 1)).to(
            dtype
        )
    assert wte.is_contiguous() and wpe.is_contiguous()
    rows, columns = idx.numel(), wte.size(1)
    out = torch.empty(rows, columns, dtype=dtype, device=idx.device)
    block, height = tile_shape(columns)
    keys, dropped = dropout_kernel_args(dropout, idx)
    _block_kernels().embed[(math.ceil(rows / height),)](
        idx.contiguous(), wte, wpe, out, keys, rows, length,
        columns=columns, BLOCK=block, ROWS=height, DROPPED=dropped,
    )  # fmt: skip
    return out


def embedding_backward(grad_output: Tensor, idx: Tensor, weight_grad: Tensor) -> None:
    """Each row of x (N, C) is added to the row of `table` (V, C) that `idx` (N,) names.

    On a CUDA device the order of additions, and so the last bits, may differ from time to time.
    """
    if not grad_output.is_cuda or torch.are_deterministic_algorithms_enabled():
        weight_grad.index_add_(0, idx, grad_output.to(weight_grad.dtype))
        return
    assert grad_output.is_contiguous() and idx.is_contiguous() and weight_grad.is_contiguous()
    rows, columns = grad_output.shape
    block, height = tile_shape(columns, numel=2048)
    _block_kernels().add_rows[(math.ceil(rows / height),)](
        grad_output, idx, weight_grad, rows, columns=columns, BLOCK=block, ROWS=height
    )
