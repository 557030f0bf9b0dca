"""Other implementations of the same training step, to be timed beside ours.

Each has the same shape, starts from the same weights and does the same step: mean loss over the
global batch, clipping, fused AdamW. On a GPU each is compiled and uses autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptforge.config import Config
from gptforge.convert.hf import TRANSPOSED, hf_config
from gptforge.device import Precision, autocast
from gptforge.errors import require_package
from gptforge.model import GPT
from gptforge.optim.adamw import build_adamw

BASELINES = {
    "hf": "transformers' GPT2LMHeadModel",
    "plain": "a plain loop with cross-entropy over all logits",
}


def describe_baseline(kind: str, device: torch.device, precision: Precision) -> str:
    """Describe a baseline on this device in a line."""
    compiled = "compiled" if device.type == "cuda" else "not compiled"
    dtype = str(precision.dtype).removeprefix("torch.")  # fp8 is ours alone
    return f"{BASELINES[kind]}; {compiled}, {dtype}, AdamW"


def build_baseline(
    kind: str, model: GPT, config: Config, precision: Precision
) -> Callable[..., Tensor]:
    """Build a training step as a plain loop does it, with the weights of `model`.

    The step takes inputs and targets of a global batch, both (G, T), and `lr`; it returns the mean
    loss without a sync.
    """
    copy: nn.Module
    if kind == "plain":
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
    else:
        copy = transformers_model(model)
    device = next(model.parameters()).device
    copy.to(device).train()

    def forward(idx: Tensor) -> Tensor:
        logits: Tensor = copy(idx) if kind == "plain" else copy(idx, use_cache=False).logits
        return logits

    compiled: Callable[[Tensor], Tensor] = (
        torch.compile(forward) if device.type == "cuda" else forward
    )
    optimizer = build_adamw(
        copy.parameters(), betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    accumulation, size = config.gradient_accumulation_steps, config.batch_size

    def step(inputs: Tensor, targets: Tensor, *, lr: float) -> Tensor:
        total = torch.zeros((), device=device)
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            with autocast(device, precision):
                loss = F.cross_entropy(compiled(x).flatten(0, 1), y.flatten()) / accumulation
            loss.backward()
            total += loss.detach()
        if config.grad_clip:
            nn.utils.clip_grad_norm_(copy.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def transformers_model(model: GPT) -> Any:
    """Build a transformers GPT2LMHeadModel with the weights of `model`, in float32 on the CPU."""
    require_package("transformers", extra="hf")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    # Random prompts have no such tokens.
    record = hf_config(model.config, {"bos_token_id": None, "eos_token_id": None})
    hf_model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(record))
    weights = {
        name: tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in model.state_dict().items()
    }
    hf_model.load_state_dict(weights)
    return hf_model
