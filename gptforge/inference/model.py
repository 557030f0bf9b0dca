"""A model's weights laid out for writing, and the keys and values that it remembers.

Sequences of a batch end at the same slot of the cache and start at different ones, so that a step
writes all of them at one place: those that are shorter are padded on the left.

Shapes: B sequences, T tokens each, C channels, H heads of D = C / H, S slots, V ids with a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gptforge.device import free_memory
from gptforge.kernels.attention import causal_attention
from gptforge.kernels.packed_linear import PackedLinear
from gptforge.model import GPT, Block

ROW_MULTIPLE = 64
"""GPUs multiply by a table of so many rows, or a multiple; an odd number is far slower."""


@dataclass(frozen=True)
class LayerWeights:
    """One block: its norms' weights and biases, its products."""

    ln_1: tuple[Tensor, Tensor]
    c_attn: PackedLinear
    attn_c_proj: PackedLinear
    ln_2: tuple[Tensor, Tensor]
    c_fc: PackedLinear
    mlp_c_proj: PackedLinear


class InferenceModel:
    """Reads ids, remembers them in a cache, and says what may come next.

    Args:
        model: its weights are used as they are, or copied if `dtype` is another one.
        size: ids that have a token, V; logits of the rows behind them are cut off.
        dtype: type of weights and products; None: the model's own.
        settled: the weights will not change: on a CPU, a copy of the large ones is laid out for
            speed, if there is memory for it.
    """

    def __init__(
        self,
        model: GPT,
        *,
        vocab_size: int,
        dtype: torch.dtype | None = None,
        frozen: bool = False,
    ) -> None:
        self.config = model.config
        self.vocab_size = vocab_size
        table = model.lm_head.weight.detach()
        self.dtype = dtype = dtype or table.dtype
        self.device = table.device
        # torch's attention for CPUs takes five times as long with bfloat16 keys as with float32.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype
        packed = frozen and self._has_room(model)

        def cast(module: object) -> tuple[Tensor, Tensor]:
            assert isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)
            return module.weight.detach().to(dtype), module.bias.detach().to(dtype)

        def product(module: object) -> PackedLinear:
            return PackedLinear(*cast(module), pack=packed)

        whole = table.to(dtype)
        self.wte = whole[:vocab_size]  # (V, C)
        self.wpe = model.get_parameter("transformer.wpe.weight").detach().to(dtype)
        self.ln_f = cast(model.transformer["ln_f"])
        # Of half-precision factors CUDA's products can give float32; others need float32 factors.
        self._widens = self.device.type == "cuda" and not torch.version.hip
        if self.device.type == "cpu":
            self.lm_head = PackedLinear(table[:vocab_size].float(), pack=packed)
        else:
            rows = _rounded(whole, vocab_size)
            self.lm_head = PackedLinear(rows if self._widens else rows.float())
        self.layers = []
        for block in model.blocks():
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            self.layers.append(
                LayerWeights(
                    cast(block.ln_1),
                    product(attn.c_attn),
                    product(attn.c_proj),
                    cast(block.ln_2),
                    product(mlp.c_fc),
                    product(mlp.c_proj),
                )
            )

    def allocate_cache(self, batch_size: int, max_seq_length: int) -> Tensor:
        """Empty keys and values: (layers, 2, B, H, S, D)."""
        c = self.config
        shape = (c.n_layer, 2, batch_size, c.n_head, max_seq_length, c.n_embd // c.n_head)
        return torch.zeros(shape, dtype=self.cache_dtype, device=self.device)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        cache: Tensor,
        cache_position: Tensor,
        attn_mask: Tensor | None,
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
            (B, V) float32 logits.
        """
        B, T = ids.shape  # noqa: N806
        x = F.embedding(ids, self.wte) + F.embedding(position_ids, self.wpe)  # (B, T, C)
        for layer, memory in zip(self.layers, cache, strict=True):
            q, k, v = self._projected(_normed(x, layer.ln_1), layer)  # (B, H, T, D)
            memory[0].index_copy_(2, cache_position, k.to(self.cache_dtype))
            memory[1].index_copy_(2, cache_position, v.to(self.cache_dtype))
            if attn_mask is None and T > 1:
                y = causal_attention(q, k, v, 0.0)
            else:
                q = q.to(self.cache_dtype)
                y = F.scaled_dot_product_attention(q, memory[0], memory[1], attn_mask=attn_mask)
            y = y.transpose(1, 2).reshape(B, T, -1).to(self.dtype)
            x = layer.attn_c_proj.forward_add(y, x)
            x = layer.mlp_c_proj.forward_add(self.mlp_hidden(layer, _normed(x, layer.ln_2)), x)
        return self.logits(_normed(x[:, -1], self.ln_f))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (B, V) of the last norm's output (B, C).

        Rounded to bfloat16, the largest of them are often equal: one position in a hundred.
        """
        if not self._widens or hidden.dtype == torch.float32:
            return self.lm_head(hidden.float())[:, : self.vocab_size]
        table = self.lm_head.weight
        return torch.mm(hidden, table.t(), out_dtype=torch.float32)[:, : self.vocab_size]

    def mlp_hidden(self, layer: LayerWeights, x: Tensor) -> Tensor:
        """What the MLP has inside: `x` through its first layer and the model's GELU."""
        return layer.c_fc.forward_gelu(x, self.config.gelu_approximate)

    def _projected(self, x: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape  # noqa: N806
        qkv = layer.c_attn(x).view(B, T, 3, self.config.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def _has_room(self, model: GPT) -> bool:
        """Whether twice the weights, for the copy and as much again, fit into what is left."""
        free = free_memory(self.device)
        count = sum(parameter.numel() for parameter in model.parameters())
        return free is None or 2 * count * self.dtype.itemsize < free


def _normed(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(x, (x.size(-1),), *weights)


def _rounded(table: Tensor, size: int) -> Tensor:
    """The first `size` rows, and some more that mean nothing, up to a round number."""
    rows = -(-size // ROW_MULTIPLE) * ROW_MULTIPLE
    if rows <= len(table):
        return table[:rows]
    return F.pad(table[:size], (0, 0, 0, rows - size))
