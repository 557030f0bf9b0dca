"""A decode step (one token for each of a few sequences) in five kernels per layer.

Replayed as a CUDA graph, the step of a small model is limited neither by memory nor by arithmetic
but by the number of kernels, each of which takes a few microseconds. Here each kernel is a
matrix-vector multiplication, fused with the operations before and after it. Activations between
kernels are float32, so the logits are more accurate than those of a bfloat16 model.

For larger batches, where GEMMs are faster, only `decode_attention` replaces torch's attention.

Shapes: B sequences, C channels, H heads of D = C / H, S slots of the KV cache, V vocabulary. A
layer's `kv_cache` is (2, B, H, S, D), keys and values.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.launch import next_power_of_2, uses_triton
from gptforge.kernels.layer_norm import EPS
from gptforge.kernels.packed_linear import PackedLinear

LayerNormWeights = tuple[Tensor, Tensor]
"""A LayerNorm's weight and bias, (C,) each."""

MAX_BATCH_SIZE = 4
"""Each sequence reads all weights again, so GEMMs are faster beyond this batch size."""
MAX_CHANNELS = 4096
"""A program holds a few rows of a weight in registers, so they cannot be longer than this."""
LARGE_VOCAB = 2**14
"""Output layers of at least this size get programs with more rows."""
NUM_SPLITS = 4
"""Programs per head (split-KV, as in flash decoding): B * H alone would not fill the GPU."""
TILE = 64
"""Slots that a program loads at a time."""


@dataclass(frozen=True)
class DecodeInputs:
    """Tokens of a decode step and their positions."""

    ids: Tensor
    """(B, 1)."""
    starts: Tensor
    """(B, 1), the first slot of each (left-padded) sequence."""
    slot: Tensor
    """(1,), the slot of all new tokens; they attend from their start up to here."""


class AttentionPartials(NamedTuple):
    """Attention over each of P splits of the slots."""

    out: Tensor
    """(B, P, C)."""
    lse: Tensor
    """(B, P, H), log-sum-exp of the scores; minus infinity for a split without slots."""


class TritonDecodeOps:
    """Kernels of a decode step, where `supports_fused_decode` holds. `x` is the residual (B, C).

    Args:
        pdl: programmatic dependent launch; see `supports_pdl`.
    """

    def __init__(self, *, pdl: bool = False) -> None:
        from gptforge.kernels.triton import decode as kernels

        self._kernels: Any = kernels
        self._pdl_args = {"PDL": pdl, "launch_pdl": pdl}

    def embedding(self, inputs: DecodeInputs, wte: Tensor, wpe: Tensor) -> Tensor:
        """Token plus position embedding: (B, C) float32."""
        assert inputs.ids.is_contiguous() and inputs.starts.is_contiguous()
        columns = wte.size(1)
        x = torch.empty(len(inputs.ids), columns, device=wte.device)
        self._kernels.embedding[(len(x),)](
            inputs.ids, inputs.starts, inputs.slot, wte, wpe, x,
            columns=columns, BLOCK=next_power_of_2(columns), **self._pdl_args,
        )  # fmt: skip
        return x

    def layer_norm_qkv(
        self,
        x: Tensor,
        norm: LayerNormWeights,
        linear: PackedLinear,
        kv_cache: Tensor,
        inputs: DecodeInputs,
    ) -> Tensor:
        """LayerNorm and QKV projection: returns q (B, C) float32, writes k and v to the cache."""
        q = torch.empty_like(x)
        self._launch(
            self._kernels.layer_norm_qkv, linear.weight, x, *norm, linear.weight, linear.bias, q,
            kv_cache, inputs.slot, EPS, *kv_cache.stride()[:3], D=kv_cache.size(-1),
            num_warps=_layer_norm_warps(linear.weight),
        )  # fmt: skip
        return q

    def split_kv_attention(
        self, q: Tensor, kv_cache: Tensor, inputs: DecodeInputs
    ) -> AttentionPartials:
        """Attention of q (B, C) over each split of its sequence's slots."""
        _, B, H, _, D = kv_cache.shape  # noqa: N806
        out = torch.empty(B, NUM_SPLITS, H * D, device=q.device)
        lse = torch.empty(B, NUM_SPLITS, H, device=q.device)
        self._kernels.split_kv_attention[(B, H, NUM_SPLITS)](
            q, kv_cache, inputs.starts, inputs.slot, out, lse, D**-0.5, *kv_cache.stride()[:3], H,
            D=D, BLOCK=next_power_of_2(D), TILE=TILE, SPLITS=NUM_SPLITS, **self._pdl_args,
        )  # fmt: skip
        return AttentionPartials(out, lse)

    def combine_proj_add(
        self, partials: AttentionPartials, linear: PackedLinear, x: Tensor
    ) -> None:
        """Combine the splits and project: x += linear(attention), in place."""
        heads = partials.lse.size(2)
        self._launch(
            self._kernels.combine_proj_add, linear.weight, *partials, linear.weight, linear.bias,
            x, heads, D=x.size(1) // heads, SPLITS=NUM_SPLITS,
        )  # fmt: skip

    def layer_norm_linear(
        self, x: Tensor, norm: LayerNormWeights, linear: PackedLinear, *, gelu: bool
    ) -> Tensor:
        """linear(layer_norm(x)), then GELU if `gelu`: (B, out) float32."""
        weight, bias = linear.weight, linear.bias
        out = torch.empty(len(x), len(weight), device=x.device)
        self._launch(
            self._kernels.layer_norm_linear, weight, x, *norm, weight,
            weight if bias is None else bias, out, len(weight), EPS,
            HAS_BIAS=bias is not None, GELU=gelu, num_warps=_layer_norm_warps(weight),
        )  # fmt: skip
        return out

    def linear_add(self, y: Tensor, linear: PackedLinear, x: Tensor) -> None:
        """x += linear(y), in place; y is (B, in)."""
        self._launch(
            self._kernels.linear_add, linear.weight, y, linear.weight, linear.bias, x, x.size(1)
        )

    def _launch(
        self, kernel: Any, weight: Tensor, x: Tensor, *args: Any, num_warps: int = 8, **options: Any
    ) -> None:
        """Launch programs for each row of x and tile of the weight's rows, held in registers.

        Few rows per program give many programs, which saturate the memory bandwidth. The output
        layer takes more: with its many programs, the LayerNorm that each repeats would dominate.
        """
        outputs, columns = weight.shape
        rows = 16 if outputs >= LARGE_VOCAB else 4
        kernel[(len(x), math.ceil(outputs / rows))](
            x, *args, columns=columns, BLOCK=next_power_of_2(min(columns, MAX_CHANNELS)), ROWS=rows,
            num_warps=num_warps, **options, **self._pdl_args,
        )  # fmt: skip


def _layer_norm_warps(weight: Tensor) -> int:
    """Warps of a program that computes a LayerNorm before its rows of `weight`, (outputs, C).

    A single warp sums the channels without waiting for others, if it can hold them.
    """
    outputs, columns = weight.shape
    return 1 if columns <= 1024 and outputs < LARGE_VOCAB else 8


def supports_pdl(device: torch.device) -> bool:
    """Whether a kernel may start while the one before is running (Hopper or later)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def supports_fused_decode(kv_cache: Tensor) -> bool:
    """Whether `TritonDecodeOps` may be tried with this cache, (layers, 2, B, H, S, D)."""
    _, _, batch, heads, _, head_size = kv_cache.shape
    return (
        supports_decode_attention(kv_cache)
        and kv_cache.dtype == torch.bfloat16
        and batch <= MAX_BATCH_SIZE
        and heads * head_size <= MAX_CHANNELS
    )


def supports_decode_attention(kv_cache: Tensor) -> bool:
    """Whether `decode_attention` may be tried with this cache, (layers, 2, B, H, S, D)."""
    return (
        kv_cache.is_cuda
        and torch.version.hip is None
        # Triton launches on the current device, whichever one the tensors are on.
        and kv_cache.device.index == torch.cuda.current_device()
        and 16 <= kv_cache.size(-1) <= 128
    )


def decode_attention(qkv: Tensor, kv_cache: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """Attention of one new token per sequence, whose key and value go into the cache.

    qkv is (B, 3 * C) and the output (B, C); `starts` and `slot` are those of `DecodeInputs`. With
    large batches a step is bound by reading the cache; torch's attention reads all slots under a
    mask, this kernel only those that are filled.
    """
    _, B, H, S, D = kv_cache.shape  # noqa: N806
    if not uses_triton(qkv):
        q, k, v = qkv.view(B, 3, H, 1, D).to(kv_cache.dtype).unbind(1)
        kv_cache[0].index_copy_(2, slot, k)
        kv_cache[1].index_copy_(2, slot, v)
        slots = torch.arange(S, device=qkv.device)
        mask = (slots >= starts) & (slots <= slot)  # (B, S)
        k, v = kv_cache
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return out.flatten(1).to(qkv.dtype)
    from gptforge.kernels.triton import decode as kernels

    assert qkv.is_contiguous() and starts.is_contiguous()
    out = torch.empty(B, H * D, dtype=qkv.dtype, device=qkv.device)
    kernels.decode_attention[(B, H)](
        qkv, kv_cache, starts, slot, out, D**-0.5, *kv_cache.stride()[:3], H,
        D=D, BLOCK=next_power_of_2(D), TILE=TILE,
    )  # fmt: skip
    return out
