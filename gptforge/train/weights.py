"""The weights that an update which is written out computes with."""

import torch
from torch import Tensor


class Weights:
    """A model's own weights, and narrow copies of them that are made once an update.

    Args:
        dtype: of the copies.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        """Of the products, as well."""
        self._copies: list[Tensor] = []
        self._sources: list[Tensor] = []

    def wide(self, parameter: Tensor) -> Tensor:
        """A parameter's values in its own type."""
        return parameter

    def narrow(self, parameter: Tensor) -> Tensor:
        """Make room for its narrow copy, which each update fills; asked for once a parameter."""
        copy = torch.empty(parameter.shape, dtype=self.dtype, device=parameter.device)
        self._copies.append(copy)
        self._sources.append(self.wide(parameter))
        return copy

    def begin(self) -> None:
        """Before an update: copy the weights as they are."""
        torch._foreach_copy_(self._copies, self._sources)

    def wait_for(self, *copies: Tensor) -> None:
        """Before the first use of narrow copies in an update."""
