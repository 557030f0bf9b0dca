"""A model's weights laid out for writing, and the keys and values that it remembers.

Sequences of a batch end at the same slot of the cache and start at different ones, so that a step
writes all of them at one place: those that are shorter are padded on the left.

Shapes: B sequences, T tokens each, C channels, H heads of D = C / H, S slots, V ids with a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.kernels.attention import attend
from gptforge.model import GPT, Block


@dataclass(frozen=True)
class Layer:
    """The weights of one block, each (out, in), with its bias."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: tuple[Tensor, Tensor]
    attn_c_proj: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    c_fc: tuple[Tensor, Tensor]
    mlp_c_proj: tuple[Tensor, Tensor]


class Engine:
    """Reads ids, remembers them in a cache, and says what may come next.

    Args:
        model: its weights are used as they are, or copied if `dtype` is another one.
        size: ids that have a token, V; the rows behind them are cut off and never computed.
        dtype: type of weights, products and cache; None: the model's own.
    """

    def __init__(self, model: GPT, *, size: int, dtype: torch.dtype | None = None) -> None:
        def cast(module: object) -> tuple[Tensor, Tensor]:
            assert isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        self.config = model.config
        self.size = size
        table = model.lm_head.weight.detach()
        self.dtype = dtype = dtype or table.dtype
        self.device = table.device
        self.wte = table.to(dtype)[:size]  # (V, C)
        self.wpe = model.get_parameter("transformer.wpe.weight").detach().to(dtype)
        self.ln_f = cast(model.transformer["ln_f"])
        self.layers = []
        for block in model.blocks():
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            parts = (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj)
            self.layers.append(Layer(*(cast(part) for part in parts)))

    def cache(self, batch: int, slots: int) -> Tensor:
        """Empty keys and values: (layers, 2, B, H, S, D)."""
        c = self.config
        shape = (c.n_layer, 2, batch, c.n_head, slots, c.n_embd // c.n_head)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(
        self, ids: Tensor, positions: Tensor, cache: Tensor, slots: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Logits behind the last of `ids`, which the cache then holds.

        Args:
            ids: (B, T).
            positions: (B, T), each id's place in its own sequence.
            cache: (layers, 2, B, H, S, D); the slots to look at, those of `ids` included.
            slots: (T,) where in the cache the ids go.
            mask: (B, 1, T, S), 0 where a token looks and minus infinity elsewhere. None: with T = 1
                it looks at all slots; else the ids are all there is, each looking at those before.

        Returns:
            (B, V) logits.
        """
        B, T = ids.shape  # noqa: N806
        x = F.embedding(ids, self.wte) + F.embedding(positions, self.wpe)  # (B, T, C)
        for layer, memory in zip(self.layers, cache, strict=True):
            q, k, v = self._projected(_normed(x, layer.ln_1), layer)  # (B, H, T, D)
            memory[0].index_copy_(2, slots, k)
            memory[1].index_copy_(2, slots, v)
            if mask is None and T > 1:
                y = attend(q, k, v, 0.0)
            else:
                y = F.scaled_dot_product_attention(q, memory[0], memory[1], attn_mask=mask)
            y = y.transpose(1, 2).reshape(B, T, -1)
            x = x + F.linear(y, *layer.attn_c_proj)
            h = F.gelu(F.linear(_normed(x, layer.ln_2), *layer.c_fc), approximate="tanh")
            x = x + F.linear(h, *layer.mlp_c_proj)
        return F.linear(_normed(x[:, -1], self.ln_f), self.wte)

    def _projected(self, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape  # noqa: N806
        qkv = F.linear(x, *layer.c_attn).view(B, T, 3, self.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v


def _normed(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, (x.size(-1),), *weights)
