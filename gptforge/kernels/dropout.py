"""Dropout masks that the backward pass recomputes from two seeds.

A stored mask would be written once and read twice, in separate kernels. Instead each row and each
column gets an odd 32-bit hash of its index and a seed. The high bits of the product of the two
hashes are close to random, and decide whether the element at (row, column) is kept. That is one
integer multiplication per element; Philox, the usual choice, takes ten rounds of two, which would
slow down attention. tests/kernels/test_dropout.py checks the masks for patterns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLD_RANGE = 2**31
"""The threshold for a dropout probability of 1."""
_UINT32 = 2**32 - 1


class DropoutSeed(NamedTuple):
    """Determines one tensor's dropout mask."""

    seeds: Tensor
    """(4,) int32: the seeds of rows and columns, the threshold, and the bits of the float32 scale.
    On the device, so that all of them may change between replays of a CUDA graph."""
    p: float
    """Dropout probability."""

    @property
    def threshold(self) -> int:
        """The probability, as a multiple of 1 / THRESHOLD_RANGE."""
        return round(self.p * THRESHOLD_RANGE)

    @property
    def scale(self) -> float:
        """Factor of the elements that are kept, which preserves the mean."""
        return THRESHOLD_RANGE / (THRESHOLD_RANGE - self.threshold)


class DropoutRate:
    """A dropout probability that may change between replays of a CUDA graph."""

    def __init__(self, p: float, device: torch.device) -> None:
        self._words = torch.empty(2, dtype=torch.int32, device=device)
        self.set(p)

    def set(self, p: float) -> None:
        """Change the probability of the seeds that are drawn from now on."""
        self._p, seed = p, DropoutSeed(self._words, p)
        # `fill_` does not wait for the device, as a copy from the host would.
        self._words[:1].fill_(seed.threshold)
        self._words[1:].view(torch.float32).fill_(seed.scale)

    def draw_seeds(self, count: int) -> list[DropoutSeed]:
        """Seeds for `count` tensors, drawn from torch's generator."""
        # Rows of four int32: Triton would recompile for pointers that are not 16-byte aligned.
        seeds = torch.empty(count, 4, dtype=torch.int32, device=self._words.device)
        seeds.random_(-(2**31), 2**31)[:, 2:] = self._words
        return [DropoutSeed(row, self._p) for row in seeds]


def dropout_kernel_args(dropout: DropoutSeed | None, placeholder: Tensor) -> tuple[Tensor, bool]:
    """Seeds for a Triton kernel, and whether it drops elements."""
    return (placeholder, False) if dropout is None else (dropout.seeds, True)


def keep_mask(dropout: DropoutSeed, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool, False where an element is dropped; the kernels compute the same.

    Attention probabilities (B, H, T, T) count as B * H * T rows of T columns.
    """
    row_seed, column_seed = (int(seed) & _UINT32 for seed in dropout.seeds[:2])
    device = dropout.seeds.device
    row_hash, column_hash = _hash(rows, row_seed, device), _hash(columns, column_seed, device)
    return (row_hash[:, None] * column_hash & _UINT32) >= 2 * dropout.threshold


def apply_dropout(dropout: DropoutSeed | None, x: Tensor) -> Tensor:
    """`x` (N, C) with elements dropped and the others scaled up; the kernels' reference."""
    return x if dropout is None else x * keep_mask(dropout, *x.shape) * dropout.scale


def _hash(count: int, seed: int, device: torch.device) -> Tensor:
    # Multiply and xorshift, with constants of Knuth (a prime near 2**32 / phi) and of Wellons'
    # hash-prospector.
    # uint32 arithmetic in int64: a multiplication may overflow, but its low 32 bits are right.
    x = torch.arange(count, device=device) * 0x9E3779B1 + seed & _UINT32
    x = (x ^ (x >> 15)) * 0x735A2D97 & _UINT32
    # Odd, and so invertible mod 2**32: a hash of zero would drop all of its row.
    return (x ^ (x >> 16)) | 1
