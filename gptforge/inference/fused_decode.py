"""Decode steps for CUDA graphs, with fused kernels where device and shape allow them.

Only for graphs: launched one by one, Triton kernels take more CPU time than torch's.
"""

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.inference.model import InferenceModel, KVCache
from gptforge.kernels.decode import (
    DecodeInputs,
    TritonDecodeOps,
    decode_attention,
    supports_decode_attention,
    supports_fused_decode,
    supports_pdl,
)
from gptforge.kernels.layer_norm import add_layer_norm

logger = logging.getLogger(__name__)

LOGIT_TOLERANCE = 0.1
"""Largest relative error of the logits from bfloat16 rounding; wrong logits have about 1."""

FusedDecode = Callable[[KVCache, DecodeInputs], Tensor]
"""`InferenceModel.forward` for one token per sequence: writes its key and value to the cache and
returns the next token's logits, (B, V) float32."""


def small_batch_decode(
    model: InferenceModel, ops: TritonDecodeOps, cache: KVCache, inputs: DecodeInputs
) -> Tensor:
    """Five matrix-vector kernels per layer, with norms, GELU and residual sums fused in."""
    x = ops.embedding(inputs, model.wte, model.wpe)
    for layer, kv in zip(model.layers, cache.data, strict=True):
        q = ops.layer_norm_qkv(x, layer.ln_1, layer.c_attn, kv, inputs)
        ops.combine_proj_add(ops.split_kv_attention(q, kv, inputs), layer.attn_c_proj, x)
        h = ops.layer_norm_linear(x, layer.ln_2, layer.c_fc, gelu=True)
        ops.linear_add(h, layer.mlp_c_proj, x)
    logits = ops.layer_norm_linear(x, model.ln_f, model.lm_head, gelu=False)
    return logits[:, : model.vocab_size]


def large_batch_decode(model: InferenceModel, cache: KVCache, inputs: DecodeInputs) -> Tensor:
    """cuBLAS GEMMs, a kernel for attention, and one for each residual addition and LayerNorm."""
    ids, starts, position = inputs.ids, inputs.starts, inputs.slot
    residual = F.embedding(ids[:, 0], model.wte)  # (B, C)
    residual = residual + F.embedding((position - starts)[:, 0], model.wpe)
    x = None
    for layer, kv in zip(model.layers, cache.data, strict=True):
        ln_out, saved = add_layer_norm(residual, x, *layer.ln_1)
        y = decode_attention(layer.c_attn(ln_out), kv, starts, position)
        ln_out, saved = add_layer_norm(saved.residual, layer.attn_c_proj(y), *layer.ln_2)
        residual, x = saved.residual, layer.mlp_c_proj(model.mlp_hidden(layer, ln_out))
    ln_out, _ = add_layer_norm(residual, x, *model.ln_f)
    return model.logits(ln_out)


def build_fused_decode(model: InferenceModel, cache: KVCache) -> FusedDecode | None:
    """The fused step for this model and batch, checked on an empty cache; None if there is none.

    It is only an optimization, so any failure (no Triton, no C compiler, an unknown GPU) falls back
    to `InferenceModel.forward`.
    """
    try:
        step: FusedDecode
        if supports_fused_decode(cache.data) and model.config.activation == "gelu_tanh":
            ops = TritonDecodeOps(pdl=supports_pdl(model.device))
            step = partial(small_batch_decode, model, ops)
        elif supports_decode_attention(cache.data):
            step = partial(large_batch_decode, model)
        else:
            return None
        return step if _matches_forward(step, model, cache) else None
    except Exception as error:
        logger.debug(f"fused decode steps do not run here: {error!r}")
        return None


def _matches_forward(step: FusedDecode, model: InferenceModel, cache: KVCache) -> bool:
    """Whether step and forward agree on a random cache; zeroes the cache."""
    data = cache.data
    data.normal_(generator=torch.Generator(data.device).manual_seed(0))
    ids = torch.zeros(data.size(2), 1, dtype=torch.long, device=data.device)
    last = torch.full((1,), data.size(-2) - 1, dtype=torch.long, device=data.device)
    starts = torch.zeros_like(ids)
    logits = step(cache, DecodeInputs(ids, starts, last)).float()
    expected = model.forward(ids, last - starts, cache, last, None).float()
    data.zero_()
    return bool((logits - expected).norm() <= LOGIT_TOLERANCE * expected.norm())
