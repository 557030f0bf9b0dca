"""AdamW (Loshchilov and Hutter, 2019), with weight decay on matrices and embeddings only."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from gptforge.optim.optimizer import Optimizer

EPS = 1e-8
STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")  # the keys of torch.optim.AdamW


class AdamW(Optimizer):
    """AdamW by torch's fused kernel, one call for each parameter group. eps is 1e-8.

    Args:
        param_groups: each with its "weight_decay", which is multiplied by the learning rate.
        betas: decay rates of the running averages of the gradient and of its square.
    """

    def __init__(
        self, param_groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]
    ) -> None:
        super().__init__(param_groups)
        self._betas = betas

    @override
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            # On the device, where skipped steps are decided: they must not count.
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }

    @override
    @torch.no_grad()
    def step(self) -> None:
        assert getattr(self, "grad_scale", None) is None, "unscale the gradients before the step"
        self.init_state()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            steps, exp_avgs, exp_avg_sqs = ([state[key] for state in states] for key in STATE_KEYS)
            # The order of torch.optim: count the step, update, and take the count back if skipped.
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps,
                lr=group["lr"], beta1=self._betas[0], beta2=self._betas[1],
                weight_decay=group["weight_decay"], eps=EPS, amsgrad=False, maximize=False,
                found_inf=self.found_inf,
            )  # fmt: skip
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))


def build_adamw(
    parameters: Iterable[Tensor],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    embeddings: Iterable[Tensor] = (),
    embedding_weight_decay: float = 0.0,
) -> AdamW:
    """Build AdamW over parameters, decaying those with two or more dimensions.

    `embeddings` have a decay of their own.
    """
    params = [p for p in parameters if p.requires_grad]
    decays = {id(p): weight_decay if p.dim() >= 2 else 0.0 for p in params}
    decays |= {id(p): embedding_weight_decay for p in embeddings}
    # One group, and so one kernel, for each value.
    values = dict.fromkeys((weight_decay, 0.0, *decays.values()))
    groups = [
        {"params": [p for p in params if decays[id(p)] == value], "weight_decay": value}
        for value in values
    ]
    return AdamW(groups, betas=betas)
