"""AdamW (Loshchilov and Hutter, 2019), decaying matrices and embeddings but no biases or norms."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gptforge.optim.optimizer import Optimizer

EPS = 1e-8
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")
"""torch's names: how many updates there were, means of the gradient and of its square."""


def build_adamw(model: nn.Module, *, betas: tuple[float, float], weight_decay: float) -> "AdamW":
    """AdamW over all of a model's parameters."""
    return adamw_from_parameters(model.parameters(), betas=betas, weight_decay=weight_decay)


def adamw_from_parameters(
    parameters: Iterable[nn.Parameter], *, betas: tuple[float, float], weight_decay: float
) -> "AdamW":
    """The same over some parameters."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, betas=betas)


class AdamW(Optimizer):
    """torch's fused kernel: one call moves all parameters of a group. eps is 1e-8.

    Args:
        param_groups: with a "weight_decay" each; multiplied by the learning rate.
        betas: how much of the two means stays in each update.
    """

    def __init__(
        self, param_groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]
    ) -> None:
        super().__init__(param_groups)
        self._betas = betas
        self._is_prepared = False

    def state_keys(self, parameter: Tensor) -> tuple[str, ...]:
        """See Optimizer."""
        return STATE_KEYS

    @torch.no_grad()
    def init_state(self) -> None:
        """See Optimizer."""
        if self._is_prepared:
            # To look for each of them again takes Python as long as to start a kernel.
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter] = {
                        # Counted on the device: an update that is left out does not count.
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                    }
        self._is_prepared = True

    @torch.no_grad()
    def step(self) -> None:
        """See Optimizer."""
        assert getattr(self, "grad_scale", None) is None, "gradients are unscaled before that"
        self.init_state()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            states = [self.state[p] for p in moved]
            steps, means, squares = ([state[slot] for state in states] for slot in STATE_KEYS)
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                moved, [p.grad for p in moved], means, squares, [], steps,
                lr=group["lr"], beta1=self._betas[0], beta2=self._betas[1],
                weight_decay=group["weight_decay"], eps=EPS, amsgrad=False, maximize=False,
                found_inf=self.found_inf,
            )  # fmt: skip
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))
