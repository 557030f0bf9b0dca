"""GPT-2's forward pass with a KV cache, for generation.

Sequences of a batch are padded on the left, so that they all end at the same cache slot and a
decode step writes the same slot for all of them.

Shapes: B sequences, T tokens, C channels, H heads of D = C / H, S cache slots, V token ids.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptforge.device import free_memory
from gptforge.kernels.attention import causal_attention
from gptforge.kernels.packed_linear import PackedLinear
from gptforge.model import GPT, Block

ROW_MULTIPLE = 64  # GEMMs are far slower with an odd number of outputs


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, (n_layer, 2, B, H, S, D)."""

    data: Tensor

    def prefix(self, length: int) -> "KVCache":
        """A view of the first `length` slots."""
        return KVCache(self.data[..., :length, :])

    def update(self, layer: int, cache_position: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v, (B, H, T, D), to slots (T,); returns the layer's (2, B, H, S, D)."""
        kv = self.data[layer]
        kv[0].index_copy_(2, cache_position, k.to(kv.dtype))
        kv[1].index_copy_(2, cache_position, v.to(kv.dtype))
        return kv


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one block; a LayerNorm is (weight, bias)."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: PackedLinear
    attn_c_proj: PackedLinear
    ln_2: tuple[Tensor, Tensor]
    c_fc: PackedLinear
    mlp_c_proj: PackedLinear


class InferenceModel:
    """A GPT's weights in the layout and dtype for generation.

    Args:
        model: weights are shared with it, or copied if `dtype` differs.
        vocab_size: number of token ids, V; logits of the embedding's padding rows are dropped.
        dtype: dtype of weights and activations; None: that of the model.
        frozen: whether the weights no longer change. On a CPU, large weights are copied into
            oneDNN's packed layout if there is memory for it.
    """

    def __init__(
        self, model: GPT, *, vocab_size: int, dtype: torch.dtype | None = None, frozen: bool = False
    ) -> None:
        self.config = model.config
        self.vocab_size = vocab_size
        embedding = model.lm_head.weight.detach()
        self.dtype = dtype = dtype or embedding.dtype
        self.device = embedding.device
        is_cpu = self.device.type == "cpu"
        # On a CPU, attention with bfloat16 keys takes five times as long as with float32.
        self.cache_dtype = torch.float32 if is_cpu else dtype
        pack = frozen and self._has_memory_for_copy(model)

        def cast(module: object) -> tuple[Tensor, Tensor]:
            assert isinstance(module, nn.Linear | nn.LayerNorm)
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        def linear(module: object) -> PackedLinear:
            return PackedLinear(*cast(module), pack=pack)

        wte = embedding.to(dtype)
        self.wte = wte[:vocab_size]  # (V, C)
        self.wpe = model.get_parameter("transformer.wpe.weight").detach().to(dtype)
        self.ln_f = cast(model.transformer["ln_f"])
        # cuBLAS can write float32 from half-precision inputs; elsewhere the inputs are cast.
        self._float32_output = self.device.type == "cuda" and not torch.version.hip
        if is_cpu:
            self.lm_head = PackedLinear(embedding[:vocab_size].float(), pack=pack)
        else:
            rows = _pad_rows(wte, vocab_size)
            self.lm_head = PackedLinear(rows if self._float32_output else rows.float())

        def convert(block: Block) -> LayerWeights:
            attn, mlp = block.attn, block.mlp
            return LayerWeights(
                cast(block.ln_1), linear(attn.c_attn), linear(attn.c_proj),
                cast(block.ln_2), linear(mlp.c_fc), linear(mlp.c_proj),
            )  # fmt: skip

        self.layers = [convert(block) for block in model.blocks()]

    def allocate_cache(self, batch_size: int, max_seq_length: int) -> KVCache:
        """An empty KV cache."""
        c = self.config
        shape = (c.n_layer, 2, batch_size, c.n_head, max_seq_length, c.n_embd // c.n_head)
        return KVCache(torch.zeros(shape, dtype=self.cache_dtype, device=self.device))

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cache: KVCache,
        cache_position: Tensor,
        attn_mask: Tensor | None,
        *,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V) float32 of the last token; all keys and values go into the cache.

        Args:
            ids: (B, T).
            position_ids: (B, T), the row of the position embedding for each token.
            cache: the slots to attend to, those of `ids` included.
            cache_position: (T,), slots of `ids`.
            attn_mask: (B, 1, T, S), added to the scores: 0 or -inf. None: a single token attends to
                all slots; several tokens are the full sequence, with causal attention.
            last: (1,), index of the last token if padding follows it.
        """
        B, T = ids.shape  # noqa: N806
        x = F.embedding(ids, self.wte) + F.embedding(position_ids, self.wpe)  # (B, T, C)
        for i, layer in enumerate(self.layers):
            qkv = layer.c_attn(_layer_norm(x, layer.ln_1))  # (B, T, 3C)
            qkv = qkv.view(B, T, 3, self.config.n_head, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
            kv = cache.update(i, cache_position, k, v)
            if attn_mask is None and T > 1:
                # Prefill from slot 0: the new keys are all there are, so skip reading the cache.
                y = causal_attention(q, k, v, 0.0)
            else:
                q = q.to(kv.dtype)
                y = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=attn_mask)
            y = y.transpose(1, 2).reshape(B, T, -1).to(self.dtype)
            x = layer.attn_c_proj.forward_add(y, x)  # (B, T, C)
            h = self.mlp_hidden(layer, _layer_norm(x, layer.ln_2))  # (B, T, 4C)
            x = layer.mlp_c_proj.forward_add(h, x)
        # Only the last position is sampled from: the output layer runs on (B, C), not (B, T, C).
        x = x[:, -1] if last is None else x.index_select(1, last)[:, 0]
        return self.logits(_layer_norm(x, self.ln_f))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (B, V) of the final LayerNorm's output (B, C).

        In bfloat16, the two largest logits would be equal at 1% of the positions.
        """
        if not self._float32_output or hidden.dtype == torch.float32:
            return self.lm_head(hidden.float())[:, : self.vocab_size]
        weight = self.lm_head.weight
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)[:, : self.vocab_size]

    def mlp_hidden(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """The MLP's hidden activations: c_fc and GELU."""
        return layer.c_fc.forward_gelu(x, self.config.gelu_approximate)

    def _has_memory_for_copy(self, model: GPT) -> bool:
        """Whether twice the size of the weights is free: the copy, and a reserve as large."""
        free = free_memory(self.device)
        numel = sum(parameter.numel() for parameter in model.parameters())
        return free is None or 2 * numel * self.dtype.itemsize < free


def _layer_norm(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, (x.size(-1),), *weights)


def _pad_rows(weight: Tensor, size: int) -> Tensor:
    """The first `size` rows, padded to a multiple of ROW_MULTIPLE with further rows or zeros."""
    rows = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    if rows <= len(weight):
        return weight[:rows]
    return F.pad(weight[:size], (0, 0, 0, rows - size))
