"""A step of writing for a captured graph, by kernels made for it, where they can be had.

Captured or not makes the difference: launched one by one, these kernels cost the host more time
than torch's own.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.generate.engine import Engine
from gptforge.kernels.block import add_norm
from gptforge.kernels.decode import ByTriton, Way, Written, comes_early, fits
from gptforge.kernels.decode_attention import attend_next, fits_many

NEAR = 0.1
"""Distance of logits, relative to their length, that bfloat16 explains; other numbers are at 1."""


class QuickStep(Protocol):
    """An engine's `forward` for one token a sequence."""

    def __call__(self, ids: Tensor, starts: Tensor, cache: Tensor, slot: Tensor) -> Tensor:
        """Logits behind `ids`, which the cache then holds.

        Args:
            ids: (B, 1).
            starts: (B, 1) the first slot of each sequence.
            cache: (layers, 2, B, H, S, D).
            slot: (1,) where in the cache the ids go; they look from their start up to here.

        Returns:
            (B, V) float32 logits.
        """


class FewSequences:
    """Five kernels a layer, each of which reads a weight for a handful of numbers.

    Args:
        engine: its weights are used as they are.
        way: how the pieces are computed.
    """

    def __init__(self, engine: Engine, way: Way) -> None:
        self.engine, self.way = engine, way

    def __call__(self, ids: Tensor, starts: Tensor, cache: Tensor, slot: Tensor) -> Tensor:
        """See QuickStep."""
        way, at = self.way, Written(ids, starts, slot)
        x = way.embed(at, self.engine.wte, self.engine.wpe)
        for layer, memory in zip(self.engine.layers, cache, strict=True):
            q = way.norm_qkv(x, layer.ln_1, layer.c_attn, memory, at)
            way.attended_onto(way.attend(q, memory, at), layer.attn_c_proj, x)
            y = way.norm_product(x, layer.ln_2, layer.c_fc, gelu=True)
            way.product_onto(y, layer.mlp_c_proj, x)
        logits = way.norm_product(x, self.engine.ln_f, self.engine.head, gelu=False)
        return logits[:, : self.engine.size]


class ManySequences:
    """torch's products, with one kernel for attention and one for each norm and sum."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, ids: Tensor, starts: Tensor, cache: Tensor, slot: Tensor) -> Tensor:
        """See QuickStep."""
        engine, branch = self.engine, None
        stream = F.embedding(ids[:, 0], engine.wte) + F.embedding(
            (slot - starts)[:, 0], engine.wpe
        )  # (B, C)
        for layer, memory in zip(engine.layers, cache, strict=True):
            normal, norm = add_norm(stream, branch, *layer.ln_1)
            mixed = attend_next(layer.c_attn(normal), memory, starts, slot)
            normal, norm = add_norm(norm.stream, layer.attn_c_proj(mixed), *layer.ln_2)
            stream, branch = norm.stream, layer.mlp_c_proj(engine.mlp_hidden(layer, normal))
        normal, _ = add_norm(stream, branch, *engine.ln_f)
        return engine.logits(normal)


def quick_step(engine: Engine, cache: Tensor) -> QuickStep | None:
    """A step by kernels made for it, tried out with an empty cache; None where none works.

    It is a matter of speed alone, so whatever stands in its way (no Triton, no C compiler for it, a
    GPU that it does not know) is no error.
    """
    try:
        step: QuickStep
        if fits(cache) and engine.config.activation == "gelu_tanh":
            step = FewSequences(engine, ByTriton(early=comes_early(cache.device)))
        elif fits_many(cache):
            step = ManySequences(engine)
        else:
            return None
        return step if _agrees(step, engine, cache) else None
    except Exception:
        return None


def _agrees(step: QuickStep, engine: Engine, cache: Tensor) -> bool:
    """Whether the engine itself comes to these logits from random memories; empties `cache`."""
    dice = torch.Generator(cache.device).manual_seed(0)
    cache.normal_(generator=dice)
    ids = torch.zeros(cache.size(2), 1, dtype=torch.long, device=cache.device)
    last = torch.full((1,), cache.size(-2) - 1, dtype=torch.long, device=cache.device)
    starts = torch.zeros_like(ids)
    ours = step(ids, starts, cache, last).float()
    theirs = engine.forward(ids, last - starts, cache, last, None).float()
    cache.zero_()
    return bool((ours - theirs).norm() <= NEAR * theirs.norm())
