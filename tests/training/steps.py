"""Training steps of a tiny model."""

import copy

import torch
from torch import Tensor

from gptforge.config import FIELDS, Config
from gptforge.device import Precision
from gptforge.model import GPT
from gptforge.optim import build_optimizer
from gptforge.training.train_step import TrainStep

FLOAT32 = Precision(torch.float32, "test")
BFLOAT16 = Precision(torch.bfloat16, "test")


def make_step(model: GPT, **options) -> TrainStep:
    """A step over a copy of the model; options of `TrainStep`, and fields of its configuration."""
    model = copy.deepcopy(model)
    fields = {name: options.pop(name) for name in FIELDS.keys() & options}
    config = Config(**{"batch_size": 8} | fields)
    return TrainStep(
        model, build_optimizer(config, model), config, **{"precision": FLOAT32} | options
    )


def make_batch(device: str | torch.device, batch_size: int = 8) -> tuple[Tensor, Tensor]:
    """The same inputs and targets each time, (batch_size, 16)."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (batch_size, 17), generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:]
