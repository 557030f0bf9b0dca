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

ALL = 2**31
"""Shares are counted in parts of this."""
_WORD = 2**32 - 1


class Drop(NamedTuple):
    """How numbers are dropped from one tensor."""

    keys: Tensor
    """(2,) int32, anything; on the tensor's device, so that a recording can be played again."""
    dropped: int
    """How many parts of `ALL`."""

    @property
    def factor(self) -> float:
        """What the numbers that stay are multiplied by, so that means stay as they are."""
        return ALL / (ALL - self.dropped)


def dropped_of(share: float) -> int:
    """`Drop.dropped` for a probability."""
    return round(share * ALL)


def throw(count: int, share: float, device: torch.device) -> list[Drop]:
    """New keys for so many tensors, from torch's generator; none if `share` drops nothing."""
    dropped = dropped_of(share)
    if not dropped:
        return []
    # Every 16 bytes: Triton compiles a kernel once more for an address that is no multiple of that.
    keys = torch.empty(count, 4, dtype=torch.int32, device=device).random_(-(2**31), 2**31)
    return [Drop(four[:2], dropped) for four in keys]


def for_kernel(drop: Drop | None, anything: Tensor) -> tuple[Tensor, int]:
    """Keys and `dropped` as the kernels in Triton take them, where there may be nothing to drop."""
    return (anything, 0) if drop is None else drop


def kept(drop: Drop, rows: int, columns: int) -> Tensor:
    """Which numbers of a (rows, columns) tensor stay; on a GPU the kernels draw by themselves.

    For attention's shares (B, H, T, T) there are B * H * T rows.
    """
    one, two = (int(key) & _WORD for key in drop.keys)
    drawn = _words(rows, one, drop)[:, None] * _words(columns, two, drop) & _WORD
    return drawn >= 2 * drop.dropped


def _words(count: int, key: int, drop: Drop) -> Tensor:
    # A 64-bit product that runs over is right in its lower half.
    x = torch.arange(count, device=drop.keys.device) * 0x9E3779B1 + key & _WORD
    x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
    return (x ^ (x >> 16)) | 1


def apply(drop: Drop | None, x: Tensor) -> Tensor:
    """x (N, C) with numbers dropped, and the rest made larger; the reference of the kernels."""
    return x if drop is None else x * kept(drop, *x.shape) * drop.factor
