"""Cross-entropy whose gradient overwrites the logits, and the output layer fused with it.

The logits are the largest tensor of a GPT-2: 3.3 GB for 32,768 tokens in bfloat16. A plain
cross-entropy reads them and writes gradients of the same size; on a CPU it also makes float32
copies. Here a row is read, and its gradient replaces it while the row is still in the cache. After
Liger-Kernel (Hsu et al., 2024) and llm.c; unlike Liger's, `fused_linear_cross_entropy` does not
chunk the rows, which would slow down the GEMMs.

Shapes: N tokens, C channels, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from gptforge.kernels.launch import next_power_of_2, num_sms, uses_triton

IGNORE_INDEX = -1
"""Targets with this value are left out of the loss."""
_CPU_CHUNK = 2**20
"""Logits per chunk on a CPU: 4 MB in float32, which stay in the L2 or L3 cache."""


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, scale: float | Tensor = 1.0, out: Tensor | None = None
) -> Tensor:
    """Losses (N,) in nats; the logits (N, V) become `scale` times the gradient of their sum.

    With `out` (N, V), such as an fp8 tensor, the gradient is written there instead. Where the
    target is IGNORE_INDEX, loss and gradient are zero.
    """
    out = logits if out is None else out
    if not uses_triton(logits):
        return _cross_entropy_torch(logits, out, targets, scale)
    from gptforge.kernels.triton import cross_entropy as kernels

    rows, columns = logits.shape
    assert logits.stride(1) == out.stride(1) == 1, "rows must be contiguous"
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if not isinstance(scale, Tensor):
        # As a tensor, so that a CUDA graph can change it, and Triton does not specialize on it.
        scale = torch.full((), scale, device=logits.device)
    # Few enough rows at a time to stay in the L2 cache until their second read: 2 per SM of
    # 2**16 columns in bf16 are 35 MB on an H100, which has 50 MB.
    programs = min(rows, 2 * num_sms(logits.device) * max(1, 2**16 // columns))
    block = min(4096, max(8, next_power_of_2(columns)))
    kernels.cross_entropy[(programs,)](
        logits, out, targets.contiguous(), losses, logits.stride(0), out.stride(0), IGNORE_INDEX,
        scale, rows, programs, columns=columns, BLOCK=block, num_warps=max(1, block // 256),
    )  # fmt: skip
    return losses


def _cross_entropy_torch(
    logits: Tensor, out: Tensor, targets: Tensor, scale: float | Tensor
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(len(logits), dtype=dtype)
    rows = max(1, _CPU_CHUNK // logits.size(1))
    tensors = (logits, out, targets, losses)
    for chunk, grad, target, loss in zip(*(x.split(rows) for x in tensors), strict=True):
        is_valid = (target != IGNORE_INDEX)[:, None]  # (n, 1)
        index = torch.where(is_valid, target[:, None], 0)
        # A copy even if the dtype is the same: the logits may be kept.
        x = chunk.to(dtype, copy=True)
        x -= x.logsumexp(1, keepdim=True)  # log-softmax, (n, V)
        loss.copy_(torch.where(is_valid, -x.gather(1, index), 0)[:, 0])
        # d loss / d logits = softmax - one_hot
        x.exp_()
        x.scatter_add_(1, index, x.new_full(index.shape, -1.0))
        grad.copy_(x.mul_(is_valid * scale))
    return losses


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` in nats, summed over the tokens; differentiable.

    Args:
        hidden: (N, C) bfloat16, or float32 on a CPU.
        weight: (V, C) float32; so is its gradient.
        targets: (N,) ids; IGNORE_INDEX where there is none.
    """
    loss: Tensor = _FusedLinearCrossEntropy.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Liger's trick: the forward computes the logits' gradient, which the backward only scales.

    The loss is a scalar, so the chain rule only multiplies these gradients by `grad_output`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        weight = weight.to(hidden.dtype)  # (V, C)
        logits = hidden @ weight.t()  # (N, V)
        losses = cross_entropy_in_place(logits, targets)
        ctx.save_for_backward(hidden, weight, logits)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, grad_logits = ctx.saved_tensors
        # cuBLAS warns if a GEMM is the first call in autograd's thread; this clone comes before it.
        scale = grad_output[0].clone()
        # Scaled in float32: rounding the scale to bfloat16 would bias all gradients the same way.
        grad_hidden = _mm_fp32(grad_logits, weight).mul_(scale)
        grad_weight = _mm_fp32(grad_logits.t(), hidden).mul_(scale)
        return grad_hidden.to(hidden.dtype), grad_weight, None


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """A matmul with a float32 result."""
    # Only CUDA's `mm` takes an output dtype.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
