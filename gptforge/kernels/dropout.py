"""Which numbers are dropped: a hash of each number's place, so that nothing has to be kept.

The way back makes the same mask again from two keys; a mask in memory would be written, read twice,
and need passes of its own. Each row and each column has an odd word of 32 bits, a hash of its
number and a key. Their product, whose upper bits are as good as random, says what becomes of the
number where they cross: one multiplication for each, since a GPU's units for whole numbers are what
attention would wait for. tests/kernels/test_dropout.py looks for patterns.

in_triton_dropout.py has the same for a GPU's kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

THRESHOLD_RANGE = 2**31
"""Shares are counted in parts of this."""
_WORD = 2**32 - 1


class DropoutSeed(NamedTuple):
    """How numbers are dropped from one tensor."""

    seeds: Tensor
    """(2,) int32, anything; on the tensor's device, so that a recording can be played again."""
    threshold: int
    """How many parts of `ALL`."""

    @property
    def scale(self) -> float:
        """What the numbers that stay are multiplied by, so that means stay as they are."""
        return THRESHOLD_RANGE / (THRESHOLD_RANGE - self.threshold)


def dropout_threshold(p: float) -> int:
    """`Drop.dropped` for a probability."""
    return round(p * THRESHOLD_RANGE)


def draw_dropout_seeds(count: int, p: float, device: torch.device) -> list[DropoutSeed]:
    """New keys for so many tensors, from torch's generator; none if `share` drops nothing."""
    dropped = dropout_threshold(p)
    if not dropped:
        return []
    # Every 16 bytes: Triton compiles a kernel once more for an address that is no multiple of that.
    keys = torch.empty(count, 4, dtype=torch.int32, device=device).random_(-(2**31), 2**31)
    return [DropoutSeed(four[:2], dropped) for four in keys]


def dropout_kernel_args(drop: DropoutSeed | None, anything: Tensor) -> tuple[Tensor, int]:
    """Keys and `dropped` as the kernels in Triton take them, where there may be nothing to drop."""
    return (anything, 0) if drop is None else drop


def keep_mask(dropout: DropoutSeed, rows: int, columns: int) -> Tensor:
    """Which numbers of a (rows, columns) tensor stay; on a GPU the kernels draw by themselves.

    For attention's shares (B, H, T, T) there are B * H * T rows.
    """
    one, two = (int(key) & _WORD for key in dropout.seeds)
    drawn = _words(rows, one, dropout)[:, None] * _words(columns, two, dropout) & _WORD
    return drawn >= 2 * dropout.threshold


def _words(count: int, key: int, drop: DropoutSeed) -> Tensor:
    # A 64-bit product that runs over is right in its lower half.
    x = torch.arange(count, device=drop.seeds.device) * 0x9E3779B1 + key & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return (x ^ (x >> 16)) | 1


def apply_dropout(dropout: DropoutSeed | None, x: Tensor) -> Tensor:
    """x (N, C) with numbers dropped, and the rest made larger; the reference of the kernels."""
    return x if dropout is None else x * keep_mask(dropout, *x.shape) * dropout.scale
