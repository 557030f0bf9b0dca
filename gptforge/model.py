"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).

Pre-norm blocks, GELU in its tanh form (nanoGPT's checkpoints use the exact one), biases, learned
position embeddings, and an output layer tied to the token embedding. Modules have the names of
GPT-2's own checkpoints, so weights convert by name.

Shapes: B sequences of T tokens, C channels (n_embd), H heads of D = C / H channels, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gptforge.config import GPTConfig
from gptforge.kernels.attention import causal_attention
from gptforge.kernels.cross_entropy import IGNORE_INDEX


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention with a causal mask."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape  # noqa: N806
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a GELU in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_ratio * config.n_embd)
        self.gelu = nn.GELU(config.gelu_approximate)
        self.c_proj = nn.Linear(config.mlp_ratio * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_proj(self.gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class _SkipInit(TorchFunctionMode):
    """Turn `torch.nn.init` into no-ops while layers are constructed.

    torch's layers draw weights that `GPT.init_weights` or a checkpoint overwrites: more than a
    second for GPT-2. On the meta device, drawing also imports torch's compiler.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class GPT(nn.Module):
    """The language model.

    The weights are uninitialized memory until `init_weights` or `load_state_dict` is called; under
    `torch.device("meta")` there is no memory either.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.dropout = config, config.dropout
        with _SkipInit():
            self.transformer = nn.ModuleDict(
                {
                    "wte": nn.Embedding(config.vocab_size, config.n_embd),
                    "wpe": nn.Embedding(config.block_size, config.n_embd),
                    "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                    "ln_f": nn.LayerNorm(config.n_embd),
                }
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        wte = self.transformer["wte"].weight
        assert isinstance(wte, nn.Parameter)
        self.lm_head.weight = wte

    def init_weights(self, generator: torch.Generator | None = None) -> "GPT":
        """Draw weights as transformers does: normal, std 0.02, smaller for residual projections."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            else:
                # 2 * n_layer sublayer outputs add up in the residual (section 2.3 of the paper).
                is_residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_residual else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)
        return self

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, num_tokens: int | None = None
    ) -> Tensor:
        """Compute logits, or the summed loss if `targets` are given.

        Args:
            idx: (B, T) token ids, with T at most block_size.
            targets: (B, T) next token ids; IGNORE_INDEX where there is none.
            num_tokens: the tokenizer's size, to leave the padding rows of the vocabulary, which are
                never sampled, out of the loss. None keeps all rows, as training does.

        Returns:
            (B, T, V) logits; with `targets` a float32 scalar, the cross-entropy in nats summed over
            tokens, so that losses of batches of any size can be added.
        """
        hidden = self.forward_hidden(idx)
        if targets is not None:
            return self.loss(hidden, targets, num_tokens)
        logits: Tensor = self.lm_head(hidden)  # (B, T, V)
        return logits

    def loss(self, hidden: Tensor, targets: Tensor, num_tokens: int | None = None) -> Tensor:
        """Compute the summed loss from the output of `forward_hidden`; arguments as `forward`."""
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
        """Compute the hidden states that the output layer reads: (B, T) ids to (B, T, C).

        Args:
            idx: (B, T) token ids.
            residual_dtype: dtype of the residual; float32 if None.
            activation_checkpointing: save only the input of each block and recompute the rest in
                the backward pass.
        """
        T = idx.size(1)  # noqa: N806
        assert self.config.block_size >= T, f"{T} tokens, but block_size {self.config.block_size}"
        wte, wpe = self.transformer["wte"], self.transformer["wpe"]
        x = wte(idx) + wpe(torch.arange(T, device=idx.device))  # (B, T, C)
        x = F.dropout(x, self.dropout, self.training)
        if residual_dtype is not None:
            x = x.to(residual_dtype)
        for block in self.blocks():
            x = checkpoint(block, x, use_reentrant=False) if activation_checkpointing else block(x)
        y: Tensor = self.transformer["ln_f"](x)
        return y

    def set_dropout(self, p: float) -> None:
        """Change the dropout probability of all layers."""
        for module in self.modules():
            if isinstance(module, (GPT, CausalSelfAttention, MLP)):
                module.dropout = p

    def blocks(self) -> Iterator[Block]:
        """Iterate over the transformer blocks, first to last."""
        return iter(cast(Iterable[Block], self.transformer["h"]))
