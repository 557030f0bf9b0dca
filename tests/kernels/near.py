"""How far a result lies from its reference."""

import torch


def distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Length of the difference, in lengths of the reference."""
    return float((value.double() - reference).norm() / reference.norm())
