"""Others that learn from the same batches, to be timed beside ours.

Each has the same shape, begins with the same weights, and makes the same update: mean loss over the
global batch, clipping, fused AdamW. Each is compiled where a GPU is used, and mixes precision in
the way that is usual for it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptforge.config import Config
from gptforge.device import Precision, autocast
from gptforge.errors import UserError, install_hint
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw

BASELINES = {
    "hf": "transformers' GPT2LMHeadModel",
    "plain": "a plain loop with cross-entropy over all logits",
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Kept as (in, out) by transformers, after the first GPT-2's code."""


def _is_compiled(device: torch.device) -> bool:
    return device.type == "cuda"


def describe_baseline(kind: str, device: torch.device, precision: Precision) -> str:
    """What a peer is on this device, in words."""
    how = "compiled" if _is_compiled(device) else "not compiled"
    return f"{BASELINES[kind]}; {how}, {precision.name}, AdamW"


class Baseline:
    """One update, as a plain loop makes it, over any model that gives logits."""

    def __init__(self, model: nn.Module, config: Config, precision: Precision) -> None:
        self._model, self._config, self._precision = model, config, precision
        self._device = next(model.parameters()).device
        self._optimizer = build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._forward: Callable[[Tensor], Tensor] = model
        if _is_compiled(self._device):
            self._forward = torch.compile(model)

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> Tensor:
        """Learn from one global batch, both (G, T); the mean loss, still on the device."""
        parts = self._config.gradient_accumulation_steps
        size = self._config.batch_size
        total = torch.zeros((), device=self._device)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with autocast(self._device, self._precision):
                logits = self._forward(x)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / parts
            loss.backward()
            total += loss.detach()
        if self._config.grad_clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._config.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total


class _Logits(nn.Module):
    """transformers' model, giving the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.model(idx, use_cache=False).logits
        return logits


def build_baseline(kind: str, model: GPT, config: Config, precision: Precision) -> Baseline:
    """A peer with the weights of `model`.

    Raises:
        UserError: if transformers is wanted and not there.
    """
    if kind == "plain":
        own = GPT(model.config).to(next(model.parameters()).device)
        own.load_state_dict(model.state_dict())
        return Baseline(own.train(), config, precision)
    peer = transformers_model(model).train()
    return Baseline(_Logits(peer).to(next(model.parameters()).device), config, precision)


def transformers_model(model: GPT) -> Any:
    """transformers' GPT2LMHeadModel with the weights of `model`, float32, on the CPU.

    Raises:
        UserError: if transformers is not there.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(f"--peer hf needs transformers: {install_hint('hf')}") from None
    transformers.utils.logging.set_verbosity_error()
    c = model.config
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_inner=c.mlp_ratio * c.n_embd,
            activation_function="gelu" if c.activation == "gelu" else "gelu_new",
            resid_pdrop=c.dropout,
            embd_pdrop=c.dropout,
            attn_pdrop=c.dropout,
            # There is no token to end or begin with among random ones.
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {
        name: tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }
    peer.load_state_dict(weights)
    return peer
