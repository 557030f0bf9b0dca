"""Muon (Jordan et al., 2024) for the blocks' matrices, AdamW for all the rest.

Muon's update is the momentum of the gradients made orthogonal: all directions in which it moves a
matrix, it moves as far. Its size is matched to AdamW's (Liu et al., "Muon is scalable for LLM
training", 2025), so that one learning rate and one decay serve both.

torch.optim.Muon, which the tests compare with, takes one matrix after the other; here those of one
shape are taken together, and an update that is not finite is left out on the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gptforge.optim.adamw import AdamW
from gptforge.optim.optimizer import Optimizer

MOMENTUM = 0.95
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, from Jordan's post: the steepest at zero that still settles."""
NS_STEPS = 5
EPS = 1e-7
MOMENTUM_BUFFER = "momentum_buffer"


class Muon(Optimizer):
    """One optimizer made of two.

    Args:
        matrices: parameters to be moved by Muon, each with the number of matrices that lie in it,
            one below the other: q, k and v are three.
        rest: AdamW over all other parameters.
        weight_decay: of the matrices; multiplied by the learning rate, as AdamW's.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, int]],
        adamw: AdamW,
        *,
        weight_decay: float,
    ) -> None:
        group = {"params": [p for p, _ in matrices], "weight_decay": weight_decay}
        super().__init__([group])
        self._rest = adamw
        self._own = self.param_groups[0]
        # One list of groups and one table of states, as for any other optimizer.
        self.param_groups.extend(adamw.param_groups)
        adamw.state = self.state
        self._alike: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for parameter, parts in matrices:
            rows, columns = parameter.shape
            assert rows % parts == 0
            self._alike.setdefault((rows // parts, columns), []).append((parameter, parts))

    def state_keys(self, parameter: Tensor) -> tuple[str, ...]:
        """See Optimizer."""
        is_own = any(p is parameter for p in self._own["params"])
        return (MOMENTUM_BUFFER,) if is_own else self._rest.state_keys(parameter)

    def init_state(self) -> None:
        """See Optimizer."""
        for parameter in self._own["params"]:
            if parameter not in self.state:
                self.state[parameter] = {
                    MOMENTUM_BUFFER: torch.zeros_like(parameter, requires_grad=False)
                }
        self._rest.init_state()

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters, each by its own rule."""
        assert getattr(self, "grad_scale", None) is None, "gradients are unscaled before that"
        self.init_state()
        for shape, members in self._alike.items():
            self._move(shape, members)
        self._rest.found_inf = self.found_inf
        self._rest.step()

    def _move(self, shape: tuple[int, int], members: list[tuple[Tensor, int]]) -> None:
        """Move the matrices of one shape."""
        buffers = [self.state[parameter][MOMENTUM_BUFFER] for parameter, _ in members]
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p, _ in members]
        if self.found_inf is not None:
            bad = self.found_inf > 0
            # As if the gradient were the momentum: neither moves then, nor does a weight below.
            gradients = [torch.where(bad, b, g) for b, g in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        # Nesterov's: one step ahead along the momentum.
        ahead = torch._foreach_lerp(gradients, buffers, MOMENTUM)
        stacked = torch.cat([x.view(-1, *shape) for x in ahead])  # (M, rows, columns)
        size = 0.2 * math.sqrt(max(shape)) * self._own["lr"]
        shrink = 1 - self._own["lr"] * self._own["weight_decay"]
        moves = newton_schulz(stacked).mul(-size).split([parts for _, parts in members])
        for (parameter, _), move in zip(members, moves, strict=True):
            moved = (parameter * shrink).add_(move.reshape(parameter.shape))
            if self.found_inf is not None:
                moved = torch.where(bad, parameter, moved)
            parameter.copy_(moved)


def newton_schulz(x: Tensor) -> Tensor:
    """The nearest matrices (M, rows, columns) with singular values near 1, in bfloat16.

    Newton-Schulz's iteration in bfloat16: singular values end between 0.7 and 1.2, which serves as
    well and costs only products.
    """
    is_tall = x.size(1) > x.size(2)
    y = (x.mT if is_tall else x).bfloat16()
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        gram = y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, gram, y, beta=a)
    return y.mT if is_tall else y
