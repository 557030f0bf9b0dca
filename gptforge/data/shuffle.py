"""Shuffling by a pseudorandom permutation of 0..n-1 that is computed, not stored.

A balanced Feistel network over the next power of four, cycle-walked until the value falls below n
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no memory, starts at
any position in constant time, and never changes: it uses 64-bit integer arithmetic only, while a
library's random numbers may differ between versions.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, the increment of SplitMix64
# SplitMix64's constants as arrays: creating them would take as long as using them.
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
ROUND_KEYS = np.arange(ROUNDS, dtype=np.uint64) * GOLDEN


def shuffled_index(
    positions: NDArray[np.int64], n: int, *, seed: int, shuffle: bool
) -> NDArray[np.int64]:
    """Index of the sequence at each position of an endless stream of shuffled epochs.

    Args:
        positions: positions in the stream; position p belongs to epoch p // n.
        n: sequences per epoch.
        seed: picks the permutation, together with the epoch.
        shuffle: False keeps the order of the text.

    Returns:
        Indices in 0..n-1, shaped like `positions`.
    """
    epochs, indices = np.divmod(positions, n)
    if not shuffle:
        return indices
    return permute(indices, n, keys=epochs.astype(np.uint64) + _seed_key(seed))


def epoch_offset(epochs: NDArray[np.int64], length: int, *, seed: int) -> NDArray[np.int64]:
    """Random offset of each epoch in tokens, from 0 to length - 1."""
    keys = _mix(epochs.astype(np.uint64) + _seed_key((seed + 1) % 2**64))
    return (keys % np.uint64(length)).astype(np.int64)


def permute(
    indices: NDArray[np.int64], n: int, *, keys: NDArray[np.uint64] | np.uint64
) -> NDArray[np.int64]:
    """Apply the permutation of 0..n-1 that `keys` selects, elementwise."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    value = indices.astype(np.uint64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), value.shape)
    value = _feistel(value, half_bits, keys)
    # The domain is at most 4n, so a few walks bring every value into range.
    while (outside := value >= n).any():
        value[outside] = _feistel(value[outside], half_bits, keys[outside])
    return value.astype(np.int64)


def _feistel(
    value: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for round_key in _mix(np.add.outer(ROUND_KEYS, keys)):
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _seed_key(seed: int) -> NDArray[np.uint64]:
    return _mix(np.array([seed], np.uint64))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    # Arrays wrap around silently; numpy scalars would warn.
    value = value + GOLDEN
    value = (value ^ (value >> SHIFTS[0])) * FACTORS[0]
    value = (value ^ (value >> SHIFTS[1])) * FACTORS[1]
    return value ^ (value >> SHIFTS[2])
