"""TODO"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.launch import num_sms
from gptforge.kernels.layer_norm import _block_kernels
from gptforge.kernels.reductions import PendingReductions, accumulate_partials


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, of (N, C)."""
    if not x.is_cuda:
        return F.gelu(x, approximate="tanh")
    out = torch.empty_like(x)
    block = 2048
    _block_kernels().gelu[(math.ceil(x.numel() / block),)](x, out, x.numel(), BLOCK=block)
    return out


def gelu_backward(
    x: Tensor,
    grad_output: Tensor,
    bias_grad: Tensor,
    pending: PendingReductions | None = None,
    *,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x in `upstream`'s place, and x; if `again`, the GELU of x in that of x.

    Making it again costs a third of this pass, and saves a quarter of all that is kept.
    `sums` (C,) grows by the gradient's sum over the rows.
    """
    if x.is_cuda:
        return _gelu_backward_cuda(x, grad_output, bias_grad, pending, recompute)
    activated = F.gelu(x, approximate="tanh") if recompute else x
    grad_output.copy_(torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh"))
    bias_grad += grad_output.sum(0, dtype=bias_grad.dtype)
    return grad_output, x.copy_(activated)


def _gelu_backward_cuda(
    x: Tensor, upstream: Tensor, sums: Tensor, unfinished: PendingReductions | None, again: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    assert x.is_contiguous() and upstream.is_contiguous()
    chunks = math.ceil(columns / 512)
    stages, each = (2, 16) if columns <= 2048 else (3, 6)
    programs = min(max(1, each * num_sms(x.device) // chunks), math.ceil(rows / 16))
    parts = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    _block_kernels().gelu_backward[(chunks, programs)](
        x, upstream, parts, rows, math.ceil(rows / (programs * 4)), columns,
        BLOCK=512, ROWS=4, AGAIN=again, STAGES=stages, num_warps=2,
    )  # fmt: skip
    accumulate_partials(parts, sums, unfinished)
    return upstream, x
