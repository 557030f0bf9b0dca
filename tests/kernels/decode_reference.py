"""The operations of `TritonDecodeOps` in plain torch, on any device."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.decode import AttentionPartials, DecodeInputs, LayerNormWeights
from gptforge.kernels.layer_norm import EPS
from gptforge.kernels.packed_linear import PackedLinear


class TorchDecodeOps:
    def embedding(self, inputs: DecodeInputs, wte: Tensor, wpe: Tensor) -> Tensor:
        positions = inputs.slot - inputs.starts[:, 0]
        return wte[inputs.ids[:, 0]].float() + wpe[positions].float()

    def layer_norm_qkv(
        self,
        x: Tensor,
        norm: LayerNormWeights,
        linear: PackedLinear,
        kv_cache: Tensor,
        inputs: DecodeInputs,
    ) -> Tensor:
        q, *kv = self.layer_norm_linear(x, norm, linear, gelu=False).chunk(3, 1)
        for cache, new in zip(kv_cache, kv, strict=True):
            new = new.view(len(x), cache.size(1), 1, -1)
            cache.index_copy_(2, inputs.slot, new.to(kv_cache.dtype))
        return q.contiguous()

    def split_kv_attention(
        self, q: Tensor, kv_cache: Tensor, inputs: DecodeInputs
    ) -> AttentionPartials:
        _, B, H, S, D = kv_cache.shape  # noqa: N806
        keys, values = kv_cache.float()  # (B, H, S, D)
        scores = (keys @ q.view(B, H, D, 1))[..., 0] / math.sqrt(D)
        slots = torch.arange(S, device=q.device)
        mask = (slots >= inputs.starts) & (slots <= inputs.slot)  # (B, S)
        scores = scores.masked_fill(~mask[:, None], -math.inf)  # (B, H, S)
        out = scores.softmax(-1)[:, :, None] @ values  # (B, H, 1, D)
        return AttentionPartials(out.view(B, 1, H * D), scores.logsumexp(-1)[:, None])

    def combine_proj_add(
        self, partials: AttentionPartials, linear: PackedLinear, x: Tensor
    ) -> None:
        B, P, H = partials.lse.shape  # noqa: N806
        weights = partials.lse.softmax(1)[..., None]  # (B, P, H, 1)
        y = (partials.out.view(B, P, H, -1) * weights).sum(1)  # (B, H, D)
        self.linear_add(y.view(B, -1), linear, x)

    def layer_norm_linear(
        self, x: Tensor, norm: LayerNormWeights, linear: PackedLinear, *, gelu: bool
    ) -> Tensor:
        weight, bias = norm
        ln_out = F.layer_norm(x, (x.size(1),), weight.float(), bias.float(), EPS)
        y = _linear_fp32(ln_out, linear)
        return F.gelu(y, approximate="tanh") if gelu else y

    def linear_add(self, y: Tensor, linear: PackedLinear, x: Tensor) -> None:
        x += _linear_fp32(y, linear)


def _linear_fp32(y: Tensor, linear: PackedLinear) -> Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(y, linear.weight.float(), bias)
