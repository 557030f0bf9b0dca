"""A step of writing, one token for each of a few sequences, in five kernels a layer.

Replayed as a CUDA graph, a step of a small model waits neither for memory nor for products but for
its many kernels, each of which takes some microseconds to come and go. `ByTriton` has few of them:
each multiplies a weight by a vector, with what comes before and after. `ByTorch` is the plain form
that it is tested against; it stands for what is computed, not for speed.

The stream and what passes between the kernels is float32, so this is nearer to the exact logits
than a model that runs in bfloat16.

Shapes: B sequences, C channels, H heads of D = C / H, S slots of the cache, V ids with a token.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.layer_norm import EPS
from gptforge.kernels.packed_linear import PackedLinear

Norm = tuple[Tensor, Tensor]
"""A LayerNorm's weight and bias, both (C,)."""

MAX_BATCH_SIZE = 4
"""Beyond, products with whole matrices pay: each sequence here fetches the weights for itself."""
MAX_CHANNELS = 4096
"""Channels that one program still holds a few rows of."""
NUM_SPLITS = 4
"""Programs that share the slots of a head: one alone would take long over a long context."""


@dataclass(frozen=True)
class DecodeInputs:
    """Where the tokens of a step are."""

    ids: Tensor
    """(B, 1)."""
    starts: Tensor
    """(B, 1) each sequence's first slot."""
    slot: Tensor
    """(1,) the slot of all these tokens. They look from their start up to here."""


class AttentionPartials(NamedTuple):
    """What attention saw in each share of the slots."""

    out: Tensor
    """(B, P, C): means of the values, weighted by the exponentials of the scores."""
    lse: Tensor
    """(B, P, H): logarithms of the weights' sums; minus infinity where there was no slot."""


class DecodeOps(Protocol):
    """How the pieces of a step are computed. `x` is the stream, (B, C) float32."""

    def embedding(self, inputs: DecodeInputs, wte: Tensor, wpe: Tensor) -> Tensor:
        """The stream's beginning."""

    def layer_norm_qkv(
        self, x: Tensor, norm: Norm, linear: PackedLinear, kv_cache: Tensor, inputs: DecodeInputs
    ) -> Tensor:
        """q, (B, C) float32; k and v go into their slot of `memory`, (2, B, H, S, D)."""

    def split_kv_attention(
        self, q: Tensor, kv_cache: Tensor, inputs: DecodeInputs
    ) -> AttentionPartials:
        """Each head's look at the slots of its sequence."""

    def combine_proj_add(
        self, partials: AttentionPartials, linear: PackedLinear, x: Tensor
    ) -> None:
        """The stream grows, in its place, by what attention saw, through `product`."""

    def layer_norm_linear(
        self, x: Tensor, norm: Norm, linear: PackedLinear, *, gelu: bool
    ) -> Tensor:
        """The normalised stream through `product`, and GELU if asked: (B, out) float32."""

    def linear_add(self, y: Tensor, linear: PackedLinear, x: Tensor) -> None:
        """The stream grows, in its place, by y (B, in) through `product`."""


class TorchDecodeOps:
    """Plainly, on any device."""

    def embedding(self, inputs: DecodeInputs, wte: Tensor, wpe: Tensor) -> Tensor:
        """See Way."""
        places = inputs.slot - inputs.starts[:, 0]
        return wte[inputs.ids[:, 0]].float() + wpe[places].float()

    def layer_norm_qkv(
        self, x: Tensor, norm: Norm, linear: PackedLinear, kv_cache: Tensor, inputs: DecodeInputs
    ) -> Tensor:
        """See Way."""
        q, k, v = self.layer_norm_linear(x, norm, linear, gelu=False).chunk(3, 1)
        for part, own in zip(kv_cache, (k, v), strict=True):
            own = own.view(len(x), part.size(1), 1, -1)
            part.index_copy_(2, inputs.slot, own.to(kv_cache.dtype))
        return q.contiguous()

    def split_kv_attention(
        self, q: Tensor, kv_cache: Tensor, inputs: DecodeInputs
    ) -> AttentionPartials:
        """See Way."""
        _, B, H, S, D = kv_cache.shape  # noqa: N806
        keys, values = kv_cache.float()  # (B, H, S, D)
        scores = (keys @ q.view(B, H, D, 1))[..., 0] / math.sqrt(D)
        slots = torch.arange(S, device=q.device)
        seen = (slots >= inputs.starts) & (slots <= inputs.slot)  # (B, S)
        scores = scores.masked_fill(~seen[:, None], -math.inf)  # (B, H, S)
        mixes = scores.softmax(-1)[:, :, None] @ values  # (B, H, 1, D)
        return AttentionPartials(mixes.view(B, 1, H * D), scores.logsumexp(-1)[:, None])

    def combine_proj_add(
        self, partials: AttentionPartials, linear: PackedLinear, x: Tensor
    ) -> None:
        """See Way."""
        B, P, H = partials.lse.shape  # noqa: N806
        shares = partials.lse.softmax(1)[..., None]  # (B, P, H, 1)
        y = (partials.out.view(B, P, H, -1) * shares).sum(1)  # (B, H, D)
        self.linear_add(y.view(B, -1), linear, x)

    def layer_norm_linear(
        self, x: Tensor, norm: Norm, linear: PackedLinear, *, gelu: bool
    ) -> Tensor:
        """See Way."""
        weight, bias = norm
        normal = F.layer_norm(x, (x.size(1),), weight.float(), bias.float(), EPS)
        y = _through(normal, linear)
        return F.gelu(y, approximate="tanh") if gelu else y

    def linear_add(self, y: Tensor, linear: PackedLinear, x: Tensor) -> None:
        """See Way."""
        x += _through(y, linear)


class TritonDecodeOps:
    """On a CUDA device, for what `fits`.

    Args:
        early: kernels come in while the one before is at work; GPUs from Hopper on can do that.
    """

    def __init__(self, *, pdl: bool = False) -> None:
        # Importing Triton takes a second, so it waits until here.
        from gptforge.kernels import in_triton_decode

        self._kernels: Any = in_triton_decode
        self._pdl_args = {"EARLY": pdl, "launch_pdl": pdl}

    def embedding(self, inputs: DecodeInputs, wte: Tensor, wpe: Tensor) -> Tensor:
        """See Way."""
        assert inputs.ids.is_contiguous() and inputs.starts.is_contiguous()
        columns = wte.size(1)
        x = torch.empty(len(inputs.ids), columns, device=wte.device)
        self._kernels.embed[(len(x),)](
            inputs.ids, inputs.starts, inputs.slot, wte, wpe, x, columns=columns, BLOCK=_next_power_of_2(columns),
            **self._pdl_args,
        )  # fmt: skip
        return x

    def layer_norm_qkv(
        self, x: Tensor, norm: Norm, linear: PackedLinear, kv_cache: Tensor, inputs: DecodeInputs
    ) -> Tensor:
        """See Way."""
        columns, weight = x.size(1), linear.weight
        q = torch.empty_like(x)
        tile = _decode_tile(columns, len(weight))
        self._kernels.norm_qkv[(len(x), math.ceil(len(weight) / tile["ROWS"]))](
            x, *norm, weight, linear.bias, q, kv_cache, inputs.slot, EPS, *kv_cache.stride()[:3],
            columns=columns, size=kv_cache.size(-1), **tile, **self._pdl_args,
        )  # fmt: skip
        return q

    def split_kv_attention(
        self, q: Tensor, kv_cache: Tensor, inputs: DecodeInputs
    ) -> AttentionPartials:
        """See Way."""
        _, B, H, _, D = kv_cache.shape  # noqa: N806
        mixes = torch.empty(B, NUM_SPLITS, H * D, device=q.device)
        logs = torch.empty(B, NUM_SPLITS, H, device=q.device)
        self._kernels.attend[(B, H, NUM_SPLITS)](
            q, kv_cache, inputs.starts, inputs.slot, mixes, logs, D**-0.5, *kv_cache.stride()[:3], H,
            size=D, BLOCK=_next_power_of_2(D), TILE=64, SPLITS=NUM_SPLITS, **self._pdl_args,
        )  # fmt: skip
        return AttentionPartials(mixes, logs)

    def combine_proj_add(
        self, partials: AttentionPartials, linear: PackedLinear, x: Tensor
    ) -> None:
        """See Way."""
        columns, heads = x.size(1), partials.lse.size(2)
        tile = _decode_tile(columns, columns)
        self._kernels.attended_onto[(len(x), math.ceil(columns / tile["ROWS"]))](
            *partials, linear.weight, linear.bias, x, heads,
            columns=columns, size=columns // heads, SPLITS=NUM_SPLITS, **tile, **self._pdl_args,
        )  # fmt: skip

    def layer_norm_linear(
        self, x: Tensor, norm: Norm, linear: PackedLinear, *, gelu: bool
    ) -> Tensor:
        """See Way."""
        columns, weight = x.size(1), linear.weight
        out = torch.empty(len(x), len(weight), device=x.device)
        tile = _decode_tile(columns, len(weight))
        self._kernels.norm_product[(len(x), math.ceil(len(weight) / tile["ROWS"]))](
            x, *norm, weight, weight if linear.bias is None else linear.bias, out, len(weight),
            EPS, columns=columns, HAS_BIAS=linear.bias is not None, GELU=gelu,
            **tile, **self._pdl_args,
        )  # fmt: skip
        return out

    def linear_add(self, y: Tensor, linear: PackedLinear, x: Tensor) -> None:
        """See Way."""
        columns, outputs = y.size(1), x.size(1)
        tile = _decode_tile(min(columns, MAX_CHANNELS), outputs)
        self._kernels.product_onto[(len(x), math.ceil(outputs / tile["ROWS"]))](
            y, linear.weight, linear.bias, x, outputs, columns=columns, **tile, **self._pdl_args
        )


def supports_pdl(device: torch.device) -> bool:
    """Whether the GPU lets a kernel in while the one before is at work."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def supports_fused_decode(kv_cache: Tensor) -> bool:
    """Whether `ByTriton` may be tried with such a cache, (layers, 2, B, H, S, D)."""
    _, _, sequences, heads, _, size = kv_cache.shape
    return (
        kv_cache.is_cuda
        and torch.version.hip is None
        and kv_cache.dtype == torch.bfloat16
        # Kernels start on the current device.
        and kv_cache.device.index == torch.cuda.current_device()
        and sequences <= MAX_BATCH_SIZE
        and 16 <= size <= 128
        and heads * size <= MAX_CHANNELS
    )


def _through(y: Tensor, product: PackedLinear) -> Tensor:
    bias = None if product.bias is None else product.bias.float()
    return F.linear(y, product.weight.float(), bias)


def _decode_tile(columns: int, outputs: int) -> dict[str, int]:
    """Columns and rows of a weight for a program, which holds them all at once.

    Few rows make many programs, which keep a GPU's memory busy; the output layer has so many that
    what each of them does for itself would come to more than its rows.
    """
    block = _next_power_of_2(columns)
    rows = 4 if outputs < 2**14 else 16
    return {"BLOCK": block, "ROWS": rows, "num_warps": 4 if rows * block <= 2**12 else 8}


def _next_power_of_2(count: int) -> int:
    """The next power of two: the only sizes that Triton's blocks have."""
    return 1 << (count - 1).bit_length()


TILE = 64
"""Slots that a program looks at at a time."""


def decode_attention(qkv: Tensor, kv_cache: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """What new tokens see of their own sequences and of themselves.

    Args:
        qkv: (B, 3 * C) of the new tokens.
        memory: (2, B, H, S, D) keys and values; those of the new tokens are put into their slot.
        starts: (B, 1) each sequence's first slot.
        slot: (1,) that of all new tokens; they look from their start up to here.

    Returns:
        (B, C), in qkv's type.
    """
    by = triton_decode_attention if qkv.is_cuda else torch_decode_attention
    return by(qkv, kv_cache, starts, slot)


def torch_decode_attention(qkv: Tensor, kv_cache: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """`attend_next`, plainly, on any device."""
    _, B, H, S, D = kv_cache.shape  # noqa: N806
    q, k, v = qkv.view(B, 3, H, 1, D).to(kv_cache.dtype).unbind(1)
    kv_cache[0].index_copy_(2, slot, k)
    kv_cache[1].index_copy_(2, slot, v)
    slots = torch.arange(S, device=qkv.device)
    seen = (slots >= starts) & (slots <= slot)  # (B, S)
    out = F.scaled_dot_product_attention(q, kv_cache[0], kv_cache[1], attn_mask=seen[:, None, None])
    return out.flatten(1).to(qkv.dtype)


def triton_decode_attention(qkv: Tensor, kv_cache: Tensor, starts: Tensor, slot: Tensor) -> Tensor:
    """`attend_next` on a CUDA device, for what `fits_many`."""
    # Importing Triton takes a second, so it waits until here.
    from gptforge.kernels import in_triton_decode

    _, B, H, _, D = kv_cache.shape  # noqa: N806
    assert qkv.is_contiguous() and starts.is_contiguous()
    out = torch.empty(B, H * D, dtype=qkv.dtype, device=qkv.device)
    in_triton_decode.attend_next[(B, H)](
        qkv, kv_cache, starts, slot, out, D**-0.5, *kv_cache.stride()[:3], H,
        size=D, BLOCK=1 << (D - 1).bit_length(), TILE=TILE,
    )  # fmt: skip
    return out


def supports_decode_attention(kv_cache: Tensor) -> bool:
    """Whether `attend_next` may be tried on a GPU with such a cache, (layers, 2, B, H, S, D)."""
    return (
        kv_cache.is_cuda
        and torch.version.hip is None
        # Kernels start on the current device.
        and kv_cache.device.index == torch.cuda.current_device()
        and 16 <= kv_cache.size(-1) <= 128
    )
