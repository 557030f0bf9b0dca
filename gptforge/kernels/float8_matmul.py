"""The matmuls of a linear layer in fp8, forward and backward.

Activations and weights are in E4M3, gradients in E5M2. Sums are in float32, and outputs in
bfloat16; weight gradients are added to a float32 buffer.

Shapes: N tokens; a weight is (out, in), as in `nn.Linear`.
"""

import torch
from torch import Tensor

from gptforge.kernels.cublaslt import Epilogue
from gptforge.kernels.float8 import Float8Tensor, unit_scale
from gptforge.kernels.matmul import find_plan, is_aligned

FAST_ACCUM = {"forward": True, "dgrad": False, "wgrad": False}
"""Whether the tensor cores sum in about 14 bits; else they pass on partial sums to float32."""


def float8_linear(x: Tensor, weight: Float8Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: `x` (N, in) in fp8, not scaled, and `bias` in bfloat16, to (N, out)."""
    out = x.new_empty(len(x), len(weight.data), dtype=torch.bfloat16)
    scales = (unit_scale(x.device), weight.scale_inv)
    return _scaled_mm(x, weight.data, scales, out, bias=bias, fast_accum=FAST_ACCUM["forward"])


def float8_dgrad(
    grad_output: Float8Tensor, weight: Float8Tensor, out: Tensor | None = None
) -> Tensor:
    """Gradient of a linear layer's input, grad_output @ weight: (N, out) to (N, in)."""
    if out is None:
        shape = (len(grad_output.data), weight.data.size(1))
        out = grad_output.data.new_empty(shape, dtype=torch.bfloat16)
    scales = (grad_output.scale_inv, weight.scale_inv)
    fast_accum = FAST_ACCUM["dgrad"]
    return _scaled_mm(grad_output.data, weight.transpose, scales, out, fast_accum=fast_accum)


def accumulate_float8_wgrad(weight_grad: Tensor, grad_output: Float8Tensor, x_t: Tensor) -> None:
    """weight_grad += grad_output.T @ x, in float32, with the transpose of `x`: (in, N) in fp8."""
    scales = (grad_output.scale_inv, unit_scale(x_t.device))
    _scaled_mm(
        grad_output.transpose, x_t, scales, weight_grad,
        accumulate=True, fast_accum=FAST_ACCUM["wgrad"],
    )  # fmt: skip


def _scaled_mm(
    left: Tensor,
    right: Tensor,
    scales: tuple[Tensor, Tensor],
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    fast_accum: bool,
) -> Tensor:
    """Write or, with `accumulate`, add left @ right.T times both scales: (M, K) and (N, K)."""
    epilogue = Epilogue.DEFAULT if bias is None else Epilogue.BIAS
    plan = find_plan(
        left, right, transpose=(False, True), epilogue=epilogue, accumulate=accumulate,
        fast_accum=fast_accum,
    )  # fmt: skip
    if plan is not None and is_aligned(out):
        return plan(left, right, out, bias=bias, scales=scales)
    if left.is_cuda and all(size % 16 == 0 for size in (*left.shape, len(right))):
        result = torch._scaled_mm(
            left, right.t(), *scales, bias=bias, out_dtype=out.dtype, use_fast_accum=fast_accum
        )
    else:
        result = (left.float() @ right.float().t()) * (scales[0] * scales[1])
        if bias is not None:
            result += bias
    return out.add_(result) if accumulate else out.copy_(result)
