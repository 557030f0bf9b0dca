"""GPT-2, after Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

Pre-norm blocks, tanh GELU (nanoGPT's models have the exact one), biases, learned positions, output
layer tied to the token table. Module names are GPT-2's own, so that converting weights is a table
of names.

Shapes: B sequences, T tokens each, C channels (n_embd), H heads of D = C / H, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gptforge.config import GPTConfig
from gptforge.kernels.attention import causal_attention

IGNORE_INDEX = -1
"""A target with this value counts for nothing in the loss."""


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        B, T, C = x.shape  # noqa: N806
        q, k, v = (
            self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        )  # (B, H, T, D)
        # torch picks the kernel: flash or cuDNN on a GPU, its own flash on a CPU.
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Each token thinks on its own."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.gelu = nn.GELU(config.gelu_approximate)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class _SkipInit(TorchFunctionMode):
    """Has torch's layers not fill themselves.

    On the meta device there is nothing to fill, but drawing there imports torch's compiler.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class GPT(nn.Module):
    """The language model: ids in, logits or a loss out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        table = self.transformer["wte"].weight
        assert isinstance(table, nn.Parameter)
        self.lm_head.weight = table

    @classmethod
    def on_meta(cls, config: GPTConfig) -> "GPT":
        """A model of names and shapes, on the meta device, which has no memory."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    @classmethod
    def empty(cls, config: GPTConfig) -> "GPT":
        """A model whose weights are still to be set, by `initialize` or from a file.

        torch's layers would fill themselves first: a second and more for GPT-2, for nothing.
        """
        with _SkipInit():
            return cls(config)

    def init_weights(self, generator: torch.Generator | None = None) -> "GPT":
        """Draw weights as GPT-2 does: normal 0.02, residual projections narrower with depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            else:
                # 2 * n_layer branches add up in the residual stream (section 2.3).
                is_residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
        return self

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, num_tokens: int | None = None
    ) -> Tensor:
        """Logits, or with `targets` the summed loss.

        Args:
            idx: (B, T) token ids, T at most block_size.
            targets: (B, T) ids one further on; IGNORE where there is none.
            num_tokens: size of the tokenizer: the loss leaves out the padding rows behind it, which
                are never sampled. None: all rows, as in training.

        Returns:
            (B, T, V) logits; with targets a float32 scalar, cross-entropy in nats summed over the
            tokens, so that batches of any size add up.
        """
        hidden = self.forward_hidden(idx)
        if targets is not None:
            return self.loss(hidden, targets, num_tokens)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def loss(self, hidden: Tensor, targets: Tensor, num_tokens: int | None = None) -> Tensor:
        """The summed loss from what `hidden` gave and targets of the same shape; see `forward`."""
        logits = self.lm_head(hidden).flatten(0, -2)
        if num_tokens is not None:
            logits = logits[:, :num_tokens]
        return F.cross_entropy(
            logits.float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )

    def forward_hidden(
        self,
        idx: Tensor,
        residual_dtype: torch.dtype | None = None,
        *,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """What the output layer reads: (B, T) ids to (B, T, C).

        The residual stream is kept in `stream`, float32 unless said otherwise. With `recompute` the
        backward pass finds only each block's input, and makes the rest again.
        """
        T = idx.size(1)  # noqa: N806
        assert self.config.block_size >= T, f"{T} tokens, {self.config.block_size} positions"
        wte, wpe = self.transformer["wte"], self.transformer["wpe"]
        x = wte(idx) + wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        if residual_dtype is not None:
            x = x.to(residual_dtype)
        for block in self.blocks():
            x = checkpoint(block, x, use_reentrant=False) if activation_checkpointing else block(x)
        y: Tensor = self.transformer["ln_f"](x)
        return y

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks, first to last."""
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return iter(blocks)
