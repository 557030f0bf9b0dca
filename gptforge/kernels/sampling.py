"""Sampling a token from the k largest logits, in two kernels instead of torch's forty.

Shapes: B sequences, V logits, N steps.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gptforge.kernels.decode import supports_pdl
from gptforge.kernels.launch import next_power_of_2

MAX_TOP_K = 512
MAX_COLUMNS = 2**18
"""A program holds the maxima of all groups, and k groups, in registers."""
GROUP = 16
"""Logits in a group; k groups then hold about as many logits as there are groups."""
MIN_TEMPERATURE = 1e-30
"""Smaller temperatures are 0 in float32, or flushed to 0 on a GPU, and 0 / 0 is NaN."""


def supports_sample_top_k(device: torch.device, columns: int, top_k: int) -> bool:
    """Whether `sample_top_k` may be tried for `columns` logits on this device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and 0 < top_k <= min(MAX_TOP_K, columns - 1)
        and columns <= MAX_COLUMNS
        # Triton launches on the current device, whichever one the tensors are on.
        and device.index == torch.cuda.current_device()
    )


def sample_top_k(
    logits: Tensor,
    uniforms: Tensor,
    counters: Tensor,
    *,
    ids: Tensor,
    token_ids: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Sample a token per sequence, writing it to `ids` and `token_ids`; advances `counters`.

    The same random number gives the same token as `gptforge.inference.sampling.sample`, except
    where it equals a cumulative probability up to rounding, or where logits are equal: here the
    lower id comes first.

    Args:
        logits: (B, V) float32.
        uniforms: (B, N) float32 in [0, 1).
        counters: (2,) int64, both incremented: the step, which is the column of `uniforms` and
            `token_ids`, and the slot of the KV cache.
        ids: (B, 1) int64.
        token_ids: (B, N, A) int64; the token is written to A = 0.
        temperature: above 0; greedy decoding is `top_k` 1.
        top_k: 1 to `MAX_TOP_K`.
        top_p: above 0, at most 1.
    """
    from gptforge.kernels.triton import sampling as kernels

    assert logits.stride(1) == uniforms.stride(1) == 1 and ids.is_contiguous()
    (B, V), device = logits.shape, logits.device  # noqa: N806
    pdl = device.type == "cuda" and supports_pdl(device)
    options: dict[str, Any] = {"GROUP": GROUP, "PDL": pdl, "launch_pdl": pdl}
    groups, block = math.ceil(V / GROUP), 64
    maxima = torch.empty(B, groups, device=device)
    kernels.group_max[(B, math.ceil(groups / block))](
        logits, maxima, counters, logits.stride(0), V, groups, BLOCK=block, **options
    )
    block_m, block_k = next_power_of_2(groups), max(32, next_power_of_2(top_k))
    # Fewer warps wait less for each other in the reductions, if their registers suffice.
    num_warps = 8 if max(block_m, block_k * GROUP) <= 4096 else 16
    top_ids = torch.empty(B, block_k, dtype=torch.int32, device=device)
    top_logits = torch.empty(B, block_k, device=device)
    kernels.sample_top_k[(B,)](
        logits, maxima, uniforms, counters, top_ids, top_logits, ids, token_ids,
        max(float(temperature), MIN_TEMPERATURE), float(top_p), top_k, min(top_k, groups),
        logits.stride(0), uniforms.stride(0), token_ids.stride(0), token_ids.stride(1), V, groups,
        BLOCK_M=block_m, BLOCK_K=block_k, TILE=32, num_warps=num_warps, **options,
    )  # fmt: skip
