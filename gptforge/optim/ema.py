"""Exponential moving average of the weights (Polyak averaging)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gptforge.distributed.dtensor import local_tensor

WINDOW_DIVISOR = 4  # early on, the average covers the last quarter of the steps so far


class WeightEMA:
    """Average of a model's weights: after each step, `decay * average + (1 - decay) * weights`.

    Training weights jump around in directions of high curvature; their average does not, and has
    the lower loss (Izmailov et al., 2018), most of all on texts that are read many times. The
    average is the model that is evaluated, saved and exported.

    The decay grows to its final value, so that the initial weights do not count for long. It grows
    in powers of two: a CUDA graph contains the decay as a constant, and is captured again whenever
    that changes.

    Args:
        model: its parameters are averaged; on a sharded model, each rank averages its shards.
        decay: final decay, from 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._params = {name: p.detach() for name, p in model.named_parameters()}
        self.tensors = {name: p.clone() for name, p in self._params.items()}
        """The averages by the parameter's name; within `swap`, the weights that are trained."""
        self._decay = decay
        self.num_updates = 0  # updates so far: the steps of the run

    @property
    def decay(self) -> float:
        """Decay of the next update."""
        window = max(1, self.num_updates // WINDOW_DIVISOR)  # steps
        return min(self._decay, 1 - 0.5 ** (window.bit_length() - 1))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights; the caller counts `num_updates`."""
        averages = [local_tensor(tensor) for tensor in self.tensors.values()]
        params = [local_tensor(tensor) for tensor in self._params.values()]
        torch._foreach_lerp_(averages, params, 1 - self.decay)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the block, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            a, b = local_tensor(average), local_tensor(self._params[name])
            held = a.clone()
            a.copy_(b)
            b.copy_(held)
