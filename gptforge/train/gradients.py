"""Gradients that are added up where products make them, all in one piece of memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Numbers: products are fastest into memory that begins at a round address."""


class Gradients:
    """The gradients of a model in one piece of memory, in the order in which they are made."""

    def __init__(self, groups: Sequence[Sequence[Tensor]]) -> None:
        starts, end = [], 0
        for group in groups:
            starts.append(end)
            end += -(-sum(p.numel() for p in group) // ALIGNMENT) * ALIGNMENT
        self.ends = [*starts[1:], end]
        """Where each group ends."""
        first = groups[0][0]
        self.flat = torch.zeros(end, dtype=first.dtype, device=first.device)
        self._views: list[tuple[Tensor, Tensor]] = []
        for place, group in zip(starts, groups, strict=True):
            for parameter in group:
                view = self.flat[place : place + parameter.numel()].view_as(parameter)
                self._views.append((parameter, view))
                place += parameter.numel()

    def clear(self) -> None:
        """Set all to zero, and make them their parameters' gradients."""
        self.flat.zero_()
        for parameter, view in self._views:
            parameter.grad = view

    def side_by_side(self, *vectors: Tensor) -> Tensor:
        """One tensor over the gradients of parameters that follow each other in a group."""
        places = [view for p in vectors for parameter, view in self._views if parameter is p]
        start, size = places[0].storage_offset(), sum(p.numel() for p in places)
        assert places[-1].storage_offset() + places[-1].numel() == start + size
        return self.flat[start : start + size]


def gradient_of(parameter: Tensor) -> Tensor:
    """Where the gradient of a parameter is added up."""
    assert parameter.grad is not None, "begin() comes first"
    return parameter.grad


def add_product(weight: Tensor, upstream: Tensor, x: Tensor) -> None:
    """Add upstream.T (out, N) @ x (N, in) to the gradient of a weight (out, in), in its type."""
    gradient = gradient_of(weight)
    if x.is_cuda and x.dtype != gradient.dtype:
        # Summed in float32 inside the product, and never rounded to the factors' type.
        torch.addmm(gradient, upstream.t(), x, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient += upstream.t() @ x
