"""Elementwise kernels of Muon; see `gptforge.kernels.muon`."""

import triton
import triton.language as tl


@triton.jit
def update_momentum(
    grad, buffer,  # (numel,) fp32
    out,  # (numel,) of the dtype to orthogonalize in
    found_inf,  # () fp32
    numel, WEIGHT: tl.constexpr, HAS_FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """buffer = lerp(buffer, grad, WEIGHT); out = lerp(buffer, grad, WEIGHT)."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    g = tl.load(grad + offset, mask=mask, other=0.0)
    b = tl.load(buffer + offset, mask=mask, other=0.0)
    if HAS_FOUND_INF:
        # The momentum in place of the gradient: the lerp does not change it.
        g = tl.where(tl.load(found_inf) > 0, b, g)
    b += WEIGHT * (g - b)
    tl.store(buffer + offset, b, mask=mask)
    tl.store(out + offset, (b + WEIGHT * (g - b)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def apply_update(
    param,  # (numel,) fp32
    update,  # (numel,)
    lr, found_inf,  # () fp32
    weight_decay, scale, numel, HAS_FOUND_INF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """param = (1 - lr * weight_decay) * param - lr * scale * update."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < numel
    rate = tl.load(lr)
    if HAS_FOUND_INF:
        rate = tl.where(tl.load(found_inf) > 0, 0.0, rate)
    p = tl.load(param + offset, mask=mask, other=0.0)
    u = tl.load(update + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(param + offset, p * (1 - rate * weight_decay) - rate * scale * u, mask=mask)
