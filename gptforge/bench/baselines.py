"""Other implementations of the same training step, to be timed beside ours.

Each has the same shape, starts from the same weights and does the same step: mean loss over the
global batch, clipping, fused AdamW. On a GPU each is compiled and uses autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from gptforge.config import Config
from gptforge.device import Precision, autocast
from gptforge.errors import require_package
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw

BASELINES = {
    "hf": "transformers' GPT2LMHeadModel",
    "plain": "a plain loop with cross-entropy over all logits",
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Weights that transformers stores as (in, out), like OpenAI's GPT-2."""


def describe_baseline(kind: str, device: torch.device, precision: Precision) -> str:
    """Describe a baseline on this device in a line."""
    compiled = "compiled" if device.type == "cuda" else "not compiled"
    return f"{BASELINES[kind]}; {compiled}, {precision.name}, AdamW"


class Baseline:
    """A training step as a plain loop does it, over any model that returns logits."""

    def __init__(self, model: nn.Module, config: Config, precision: Precision) -> None:
        self._model, self._config, self._precision = model, config, precision
        self._device = next(model.parameters()).device
        self._optimizer = build_adamw(
            model.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._forward: Callable[[Tensor], Tensor] = model
        if self._device.type == "cuda":
            self._forward = torch.compile(model)

    def __call__(self, inputs: Tensor, targets: Tensor, *, lr: float) -> Tensor:
        """Train on one global batch, both (G, T); return the mean loss without a sync."""
        accumulation, size = self._config.gradient_accumulation_steps, self._config.batch_size
        total = torch.zeros((), device=self._device)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with autocast(self._device, self._precision):
                logits = self._forward(x)
                loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) / accumulation
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
    """A transformers model that returns the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, idx: Tensor) -> Tensor:
        logits: Tensor = self.model(idx, use_cache=False).logits
        return logits


def build_baseline(kind: str, model: GPT, config: Config, precision: Precision) -> Baseline:
    """Build a baseline with the weights of `model`.

    Raises:
        UserError: if transformers is needed and not installed.
    """
    copy: nn.Module
    if kind == "plain":
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
    else:
        copy = _Logits(transformers_model(model))
    return Baseline(copy.to(next(model.parameters()).device).train(), config, precision)


def transformers_model(model: GPT) -> Any:
    """Build a transformers GPT2LMHeadModel with the weights of `model`, in float32 on the CPU.

    Raises:
        UserError: if transformers is not installed.
    """
    require_package("transformers", extra="hf")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    c = model.config
    hf_model = transformers.GPT2LMHeadModel(
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
            # Random prompts have no such tokens.
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {
        name: tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }
    hf_model.load_state_dict(weights)
    return hf_model
