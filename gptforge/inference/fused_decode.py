"""A step of writing for a captured graph, by kernels made for it, where they can be had.

Captured or not makes the difference: launched one by one, these kernels cost the host more time
than torch's own.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.inference.model import InferenceModel
from gptforge.kernels.decode import (
    DecodeInputs,
    TritonDecodeOps,
    decode_attention,
    supports_decode_attention,
    supports_fused_decode,
    supports_pdl,
)
from gptforge.kernels.layer_norm import add_layer_norm

LOGIT_TOLERANCE = 0.1
"""Distance of logits, relative to their length, that bfloat16 explains; other numbers are at 1."""


class FusedDecode(Protocol):
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


class SmallBatchDecode:
    """Five kernels a layer, each of which reads a weight for a handful of numbers.

    Args:
        engine: its weights are used as they are.
        way: how the pieces are computed.
    """

    def __init__(self, engine: InferenceModel, way: TritonDecodeOps) -> None:
        self.model, self.ops = engine, way

    def __call__(self, ids: Tensor, starts: Tensor, cache: Tensor, slot: Tensor) -> Tensor:
        """See QuickStep."""
        way, at = self.ops, DecodeInputs(ids, starts, slot)
        x = way.embedding(at, self.model.wte, self.model.wpe)
        for layer, memory in zip(self.model.layers, cache, strict=True):
            q = way.layer_norm_qkv(x, layer.ln_1, layer.c_attn, memory, at)
            way.combine_proj_add(way.split_kv_attention(q, memory, at), layer.attn_c_proj, x)
            y = way.layer_norm_linear(x, layer.ln_2, layer.c_fc, gelu=True)
            way.linear_add(y, layer.mlp_c_proj, x)
        logits = way.layer_norm_linear(x, self.model.ln_f, self.model.lm_head, gelu=False)
        return logits[:, : self.model.vocab_size]


class LargeBatchDecode:
    """torch's products, with one kernel for attention and one for each norm and sum."""

    def __init__(self, engine: InferenceModel) -> None:
        self.model = engine

    def __call__(self, ids: Tensor, starts: Tensor, cache: Tensor, slot: Tensor) -> Tensor:
        """See QuickStep."""
        engine, branch = self.model, None
        stream = F.embedding(ids[:, 0], engine.wte) + F.embedding(
            (slot - starts)[:, 0], engine.wpe
        )  # (B, C)
        for layer, memory in zip(engine.layers, cache, strict=True):
            normal, norm = add_layer_norm(stream, branch, *layer.ln_1)
            mixed = decode_attention(layer.c_attn(normal), memory, starts, slot)
            normal, norm = add_layer_norm(norm.residual, layer.attn_c_proj(mixed), *layer.ln_2)
            stream, branch = norm.residual, layer.mlp_c_proj(engine.mlp_hidden(layer, normal))
        normal, _ = add_layer_norm(stream, branch, *engine.ln_f)
        return engine.logits(normal)


def build_fused_decode(engine: InferenceModel, cache: Tensor) -> FusedDecode | None:
    """A step by kernels made for it, tried out with an empty cache; None where none works.

    It is a matter of speed alone, so whatever stands in its way (no Triton, no C compiler for it, a
    GPU that it does not know) is no error.
    """
    try:
        step: FusedDecode
        if supports_fused_decode(cache) and engine.config.activation == "gelu_tanh":
            step = SmallBatchDecode(engine, TritonDecodeOps(pdl=supports_pdl(cache.device)))
        elif supports_decode_attention(cache):
            step = LargeBatchDecode(engine)
        else:
            return None
        return step if _agrees(step, engine, cache) else None
    except Exception:
        return None


def _agrees(step: FusedDecode, engine: InferenceModel, cache: Tensor) -> bool:
    """Whether the engine itself comes to these logits from random memories; empties `cache`."""
    dice = torch.Generator(cache.device).manual_seed(0)
    cache.normal_(generator=dice)
    ids = torch.zeros(cache.size(2), 1, dtype=torch.long, device=cache.device)
    last = torch.full((1,), cache.size(-2) - 1, dtype=torch.long, device=cache.device)
    starts = torch.zeros_like(ids)
    ours = step(ids, starts, cache, last).float()
    theirs = engine.forward(ids, last - starts, cache, last, None).float()
    cache.zero_()
    return bool((ours - theirs).norm() <= LOGIT_TOLERANCE * theirs.norm())
