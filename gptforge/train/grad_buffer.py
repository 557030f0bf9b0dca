"""Gradients that are added up where products make them, all in one piece of memory."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Numbers: products are fastest into memory that begins at a round address."""


class GradBuffer:
    """The gradients of a model in one piece of memory, in the order in which they are made."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        starts, end = [], 0
        for group in groups:
            starts.append(end)
            end += round_up(sum(self._size_of(p) for p in group), ALIGNMENT)
        self.group_ends = [*starts[1:], end]
        """Where each group ends."""
        first = groups[0][0]
        self.flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        self._views: dict[Tensor, Tensor] = {}
        for place, group in zip(starts, groups, strict=True):
            for parameter in group:
                view = self.flat[place : place + parameter.numel()]
                self._views[parameter] = view.view(parameter.shape)
                place += self._size_of(parameter)

    def view(self, parameter: Tensor) -> Tensor:
        """Where the gradient of a parameter is added up."""
        return self._views[parameter]

    def zero_(self) -> None:
        """Set all to zero, and hand them over."""
        self.flat.zero_()
        self.assign_grads()

    def assign_grads(self) -> None:
        """Make them their parameters' gradients, where an optimizer looks for them."""
        for parameter, gradient in self._for_optimizer.items():
            parameter.grad = gradient

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Shorten the gradients if their norm is above `longest`; the norm before that."""
        norm: Tensor = torch.linalg.vector_norm(self.flat)
        # A plain product with a number on the device takes one that torch does not vectorize.
        torch._foreach_mul_([self.flat], clip_coef(norm, max_norm))
        return norm

    def contiguous_view(self, *vectors: Tensor) -> Tensor:
        """One tensor over the gradients of parameters that follow each other in a group."""
        places = [self._views[p] for p in vectors]
        start, size = places[0].storage_offset(), sum(p.numel() for p in places)
        assert places[-1].storage_offset() + places[-1].numel() == start + size
        return self.flat[start : start + size]

    def _size_of(self, parameter: Tensor) -> int:
        """Numbers that a parameter's gradient takes."""
        return parameter.numel()

    @functools.cached_property
    def _for_optimizer(self) -> dict[Tensor, Tensor]:
        """What each parameter gets as its `grad`."""
        return self._views


def round_up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def clip_coef(total_norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are to be multiplied by; nothing waits for the norm."""
    # As torch's clip_grad_norm_ does it.
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
