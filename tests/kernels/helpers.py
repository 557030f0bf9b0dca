"""Random inputs, and the distance of a result from its reference."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on CPU tensors; see test_interpreted.py."""


def bf16(*shape: int, device: torch.device, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(device, torch.bfloat16)


def rel_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference, relative to the reference's."""
    reference = reference.detach().double()
    return float((value.detach().double() - reference).norm() / reference.norm())
