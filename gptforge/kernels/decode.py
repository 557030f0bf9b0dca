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

from gptforge.kernels.block import EPS
from gptforge.kernels.product import Product

Norm = tuple[Tensor, Tensor]
"""A LayerNorm's weight and bias, both (C,)."""

MOST_SEQUENCES = 4
"""Beyond, products with whole matrices pay: each sequence here fetches the weights for itself."""
WIDEST = 4096
"""Channels that one program still holds a few rows of."""
SPLITS = 4
"""Programs that share the slots of a head: one alone would take long over a long context."""


@dataclass(frozen=True)
class Written:
    """Where the tokens of a step are."""

    ids: Tensor
    """(B, 1)."""
    starts: Tensor
    """(B, 1) each sequence's first slot."""
    slot: Tensor
    """(1,) the slot of all these tokens. They look from their start up to here."""


class Parts(NamedTuple):
    """What attention saw in each share of the slots."""

    mixes: Tensor
    """(B, P, C): means of the values, weighted by the exponentials of the scores."""
    logs: Tensor
    """(B, P, H): logarithms of the weights' sums; minus infinity where there was no slot."""


class Way(Protocol):
    """How the pieces of a step are computed. `x` is the stream, (B, C) float32."""

    def embed(self, at: Written, wte: Tensor, wpe: Tensor) -> Tensor:
        """The stream's beginning."""

    def norm_qkv(
        self, x: Tensor, norm: Norm, product: Product, memory: Tensor, at: Written
    ) -> Tensor:
        """q, (B, C) float32; k and v go into their slot of `memory`, (2, B, H, S, D)."""

    def attend(self, q: Tensor, memory: Tensor, at: Written) -> Parts:
        """Each head's look at the slots of its sequence."""

    def attended_onto(self, parts: Parts, product: Product, x: Tensor) -> None:
        """The stream grows, in its place, by what attention saw, through `product`."""

    def norm_product(self, x: Tensor, norm: Norm, product: Product, *, gelu: bool) -> Tensor:
        """The normalised stream through `product`, and GELU if asked: (B, out) float32."""

    def product_onto(self, y: Tensor, product: Product, x: Tensor) -> None:
        """The stream grows, in its place, by y (B, in) through `product`."""


class ByTorch:
    """Plainly, on any device."""

    def embed(self, at: Written, wte: Tensor, wpe: Tensor) -> Tensor:
        """See Way."""
        places = at.slot - at.starts[:, 0]
        return wte[at.ids[:, 0]].float() + wpe[places].float()

    def norm_qkv(
        self, x: Tensor, norm: Norm, product: Product, memory: Tensor, at: Written
    ) -> Tensor:
        """See Way."""
        q, k, v = self.norm_product(x, norm, product, gelu=False).chunk(3, 1)
        for part, own in zip(memory, (k, v), strict=True):
            own = own.view(len(x), part.size(1), 1, -1)
            part.index_copy_(2, at.slot, own.to(memory.dtype))
        return q.contiguous()

    def attend(self, q: Tensor, memory: Tensor, at: Written) -> Parts:
        """See Way."""
        _, B, H, S, D = memory.shape  # noqa: N806
        keys, values = memory.float()  # (B, H, S, D)
        scores = (keys @ q.view(B, H, D, 1))[..., 0] / math.sqrt(D)
        slots = torch.arange(S, device=q.device)
        seen = (slots >= at.starts) & (slots <= at.slot)  # (B, S)
        scores = scores.masked_fill(~seen[:, None], -math.inf)  # (B, H, S)
        mixes = scores.softmax(-1)[:, :, None] @ values  # (B, H, 1, D)
        return Parts(mixes.view(B, 1, H * D), scores.logsumexp(-1)[:, None])

    def attended_onto(self, parts: Parts, product: Product, x: Tensor) -> None:
        """See Way."""
        B, P, H = parts.logs.shape  # noqa: N806
        shares = parts.logs.softmax(1)[..., None]  # (B, P, H, 1)
        y = (parts.mixes.view(B, P, H, -1) * shares).sum(1)  # (B, H, D)
        self.product_onto(y.view(B, -1), product, x)

    def norm_product(self, x: Tensor, norm: Norm, product: Product, *, gelu: bool) -> Tensor:
        """See Way."""
        weight, bias = norm
        normal = F.layer_norm(x, (x.size(1),), weight.float(), bias.float(), EPS)
        y = _through(normal, product)
        return F.gelu(y, approximate="tanh") if gelu else y

    def product_onto(self, y: Tensor, product: Product, x: Tensor) -> None:
        """See Way."""
        x += _through(y, product)


class ByTriton:
    """On a CUDA device, for what `fits`.

    Args:
        early: kernels come in while the one before is at work; GPUs from Hopper on can do that.
    """

    def __init__(self, *, early: bool = False) -> None:
        # Importing Triton takes a second, so it waits until here.
        from gptforge.kernels import in_triton_decode

        self.kernels: Any = in_triton_decode
        self.early = {"EARLY": early, "launch_pdl": early}

    def embed(self, at: Written, wte: Tensor, wpe: Tensor) -> Tensor:
        """See Way."""
        assert at.ids.is_contiguous() and at.starts.is_contiguous()
        columns = wte.size(1)
        x = torch.empty(len(at.ids), columns, device=wte.device)
        self.kernels.embed[(len(x),)](
            at.ids, at.starts, at.slot, wte, wpe, x, columns=columns, BLOCK=_up(columns),
            **self.early,
        )  # fmt: skip
        return x

    def norm_qkv(
        self, x: Tensor, norm: Norm, product: Product, memory: Tensor, at: Written
    ) -> Tensor:
        """See Way."""
        columns, weight = x.size(1), product.weight
        q = torch.empty_like(x)
        tile = _tile(columns, len(weight))
        self.kernels.norm_qkv[(len(x), math.ceil(len(weight) / tile["ROWS"]))](
            x, *norm, weight, product.bias, q, memory, at.slot, EPS, *memory.stride()[:3],
            columns=columns, size=memory.size(-1), **tile, **self.early,
        )  # fmt: skip
        return q

    def attend(self, q: Tensor, memory: Tensor, at: Written) -> Parts:
        """See Way."""
        _, B, H, _, D = memory.shape  # noqa: N806
        mixes = torch.empty(B, SPLITS, H * D, device=q.device)
        logs = torch.empty(B, SPLITS, H, device=q.device)
        self.kernels.attend[(B, H, SPLITS)](
            q, memory, at.starts, at.slot, mixes, logs, D**-0.5, *memory.stride()[:3], H,
            size=D, BLOCK=_up(D), TILE=64, SPLITS=SPLITS, **self.early,
        )  # fmt: skip
        return Parts(mixes, logs)

    def attended_onto(self, parts: Parts, product: Product, x: Tensor) -> None:
        """See Way."""
        columns, heads = x.size(1), parts.logs.size(2)
        tile = _tile(columns, columns)
        self.kernels.attended_onto[(len(x), math.ceil(columns / tile["ROWS"]))](
            *parts, product.weight, product.bias, x, heads,
            columns=columns, size=columns // heads, SPLITS=SPLITS, **tile, **self.early,
        )  # fmt: skip

    def norm_product(self, x: Tensor, norm: Norm, product: Product, *, gelu: bool) -> Tensor:
        """See Way."""
        columns, weight = x.size(1), product.weight
        out = torch.empty(len(x), len(weight), device=x.device)
        tile = _tile(columns, len(weight))
        self.kernels.norm_product[(len(x), math.ceil(len(weight) / tile["ROWS"]))](
            x, *norm, weight, weight if product.bias is None else product.bias, out, len(weight),
            EPS, columns=columns, HAS_BIAS=product.bias is not None, GELU=gelu,
            **tile, **self.early,
        )  # fmt: skip
        return out

    def product_onto(self, y: Tensor, product: Product, x: Tensor) -> None:
        """See Way."""
        columns, outputs = y.size(1), x.size(1)
        tile = _tile(min(columns, WIDEST), outputs)
        self.kernels.product_onto[(len(x), math.ceil(outputs / tile["ROWS"]))](
            y, product.weight, product.bias, x, outputs, columns=columns, **tile, **self.early
        )


def comes_early(device: torch.device) -> bool:
    """Whether the GPU lets a kernel in while the one before is at work."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def fits(memory: Tensor) -> bool:
    """Whether `ByTriton` may be tried with such a cache, (layers, 2, B, H, S, D)."""
    _, _, sequences, heads, _, size = memory.shape
    return (
        memory.is_cuda
        and torch.version.hip is None
        and memory.dtype == torch.bfloat16
        # Kernels start on the current device.
        and memory.device.index == torch.cuda.current_device()
        and sequences <= MOST_SEQUENCES
        and 16 <= size <= 128
        and heads * size <= WIDEST
    )


def _through(y: Tensor, product: Product) -> Tensor:
    bias = None if product.bias is None else product.bias.float()
    return F.linear(y, product.weight.float(), bias)


def _tile(columns: int, outputs: int) -> dict[str, int]:
    """Columns and rows of a weight for a program, which holds them all at once.

    Few rows make many programs, which keep a GPU's memory busy; the output layer has so many that
    what each of them does for itself would come to more than its rows.
    """
    block = _up(columns)
    rows = 4 if outputs < 2**14 else 16
    return {"BLOCK": block, "ROWS": rows, "num_warps": 4 if rows * block <= 2**12 else 8}


def _up(count: int) -> int:
    """The next power of two: the only sizes that Triton's blocks have."""
    return 1 << (count - 1).bit_length()
