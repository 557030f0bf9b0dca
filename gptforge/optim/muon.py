"""Muon (Jordan et al., 2024) for the blocks' matrices, and AdamW for all other parameters.

Muon's update is the momentum of the gradient, orthogonalized. It is scaled to the RMS of AdamW's
updates (Liu et al., "Muon is scalable for LLM training", 2025), so both can share one learning rate
and one weight decay. Small models that read their text many times want both larger for Muon.

Unlike torch.optim.Muon, which the tests compare with, this one orthogonalizes all matrices of a
shape in one batch, and skips steps with NaN or Inf on the device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from gptforge.kernels.muon import apply_update, update_momentum
from gptforge.optim.adamw import AdamW
from gptforge.optim.optimizer import Optimizer

MOMENTUM = 0.95
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, with the steepest slope at zero (Jordan)."""
NS_STEPS = 5
EPS = 1e-7
MOMENTUM_BUFFER = "momentum_buffer"


class Muon(Optimizer):
    """Muon over the given matrices and AdamW over the rest, as one optimizer.

    Args:
        matrices: the parameters for Muon, each with the number of matrices stacked in it along the
            first dimension: 3 for q, k and v, else 1.
        adamw: the optimizer of all other parameters.
        weight_decay: for the matrices; multiplied by the learning rate.
        lr_scale: learning rate of the matrices, as a multiple of AdamW's.
        dtype: of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[Tensor, int]],
        adamw: AdamW,
        *,
        weight_decay: float,
        lr_scale: float = 1.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        params = [p for p, _ in matrices]
        super().__init__([{"params": params, "weight_decay": weight_decay, "lr_scale": lr_scale}])
        self._adamw, self._dtype = adamw, dtype
        self._muon_group = self.param_groups[0]
        # Groups and state are shared with AdamW, so that checkpoints see one optimizer.
        self.param_groups.extend(adamw.param_groups)
        adamw.state = self.state
        self._by_shape: dict[tuple[int, int], list[tuple[Tensor, int]]] = {}
        for parameter, count in matrices:
            rows, columns = parameter.shape
            assert rows % count == 0
            self._by_shape.setdefault((rows // count, columns), []).append((parameter, count))

    @override
    def new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        if any(p is parameter for p in self._muon_group["params"]):
            return {MOMENTUM_BUFFER: torch.zeros_like(parameter, requires_grad=False)}
        return self._adamw.new_state(parameter)

    @override
    @torch.no_grad()
    def step(self) -> None:
        assert getattr(self, "grad_scale", None) is None, "unscale the gradients before the step"
        self.init_state()
        for shape, members in self._by_shape.items():
            self._update(shape, members)
        self._adamw.found_inf = self.found_inf
        self._adamw.step()

    def _update(self, shape: tuple[int, int], members: list[tuple[Tensor, int]]) -> None:
        """Update all matrices of one shape."""
        params, counts = [p for p, _ in members], [count for _, count in members]
        # One batch per shape: GPT-2's blocks have three, for 6 * n_layer matrices.
        stacked = params[0].new_empty(sum(counts), *shape, dtype=self._dtype)
        chunks = [x.view_as(p) for x, p in zip(stacked.split(counts), params, strict=True)]
        update_momentum(
            [p.grad if p.grad is not None else torch.zeros_like(p) for p in params],
            [self.state[p][MOMENTUM_BUFFER] for p in params],
            chunks, momentum=MOMENTUM, found_inf=self.found_inf,
        )  # fmt: skip
        updates = newton_schulz(stacked).split(counts)
        apply_update(
            params, [x.view_as(p) for x, p in zip(updates, params, strict=True)],
            lr=self._muon_group["lr"], weight_decay=self._muon_group["weight_decay"],
            # An orthogonal matrix has an RMS of 1 / sqrt(max(rows, columns)); AdamW's updates, 0.2.
            scale=0.2 * math.sqrt(max(shape)), found_inf=self.found_inf,
        )  # fmt: skip


def newton_schulz(x: Tensor) -> Tensor:
    """Approximate U @ V.T of the SVD of each matrix (M, rows, columns), in the dtype of `x`.

    Each iteration maps every singular value s to a * s + b * s**3 + c * s**5. They end between 0.7
    and 1.2, which trains as well as 1 (Jordan), and unlike an SVD it takes only matmuls, for which
    bfloat16 suffices.
    """
    is_tall = x.size(1) > x.size(2)
    # The Frobenius norm bounds the spectral norm: all singular values are at most 1.
    y: Tensor = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    a, b, c = NS_COEFFICIENTS
    for _ in range(NS_STEPS):
        # The smaller of the two Gram matrices, (M, min(rows, columns), min(rows, columns)).
        gram = y.mT @ y if is_tall else y @ y.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, y, gram, beta=a) if is_tall else torch.baddbmm(y, gram, y, beta=a)
    return y
