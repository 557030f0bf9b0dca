"""What a training loop asks of an optimizer, and no more.

torch's own base class imports torch's compiler when one is built, used or not: docs/log.md has the
seconds. Its fused kernels need no more than lists of tensors.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Optimizer(ABC):
    """Groups of parameters and what is remembered of each, named as torch names them.

    Args:
        param_groups: each with its parameters under "params", and with the settings that they
            share. The learning rate, "lr", is set before each step.
    """

    found_inf: Tensor | None = None
    """Set before a step: above zero, on the device, if the update is to be left out."""
    # How torch's gradient scaler knows that the flag above is looked at. It sets `grad_scale`
    # beside it, which is None for gradients that were brought to their size before.
    _step_supports_amp_scaling = True

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        self.param_groups = [{"lr": 0.0, **group} for group in param_groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        assert set_to_none, "gradients are added up anew in each update"
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @abstractmethod
    def state_keys(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of what is remembered of a parameter."""

    @abstractmethod
    def init_state(self) -> None:
        """Take the memory of all that will be remembered, which the first step does otherwise."""

    @abstractmethod
    def step(self) -> None:
        """Move the parameters by their gradients; those without one stay."""
