"""The order of the windows: a permutation of 0..n-1 that is computed, not stored.

A balanced Feistel network over the next power of four, walked along its cycle until the value falls
below n (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It takes no memory
in proportion to the data, jumps to any place at once, and is the same for ever: it uses nothing but
64-bit integer arithmetic, unlike a library's random numbers, which may change between versions.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: steps that spread evenly
# SplitMix64's. Made once: making them takes as long as using them.
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SALTS = np.arange(ROUNDS, dtype=np.uint64) * GOLDEN


def shuffled_index(
    positions: NDArray[np.int64], n: int, *, seed: int, shuffle: bool
) -> NDArray[np.int64]:
    """Which window stands at each position of the endless stream of epochs.

    Args:
        positions: places in the stream, one or more; position p lies in epoch p // n.
        n: number of windows in an epoch.
        seed: with the epoch, it picks the permutation.
        shuffle: False keeps the order of the text.

    Returns:
        Window numbers in 0..n-1, shaped like `positions`.
    """
    epochs, places = np.divmod(positions, n)
    if not shuffle:
        return places
    return permute(places, n, keys=epochs.astype(np.uint64) + _key_of(seed))


def epoch_offset(epochs: NDArray[np.int64], length: int, *, seed: int) -> NDArray[np.int64]:
    """By how many tokens, from 0 to below `length`, the windows of each epoch start later."""
    keys = _mix(epochs.astype(np.uint64) + _key_of((seed + 1) % 2**64))
    return (keys % np.uint64(length)).astype(np.int64)


def permute(
    indices: NDArray[np.int64], n: int, *, keys: NDArray[np.uint64] | np.uint64
) -> NDArray[np.int64]:
    """Image of `places` under the permutation of 0..n-1 that `keys` picks, elementwise."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    value = indices.astype(np.uint64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), value.shape)
    value = _feistel(value, half_bits, keys)
    # At most 4 values stand for each one in range, so a few walks settle all of them.
    while (outside := value >= n).any():
        value[outside] = _feistel(value[outside], half_bits, keys[outside])
    return value.astype(np.int64)


def _feistel(
    value: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for salted in _mix(np.add.outer(SALTS, keys)):
        left, right = right, left ^ (_mix(right ^ salted) & mask)
    return (left << half_bits) | right


def _key_of(seed: int) -> NDArray[np.uint64]:
    return _mix(np.array([seed], np.uint64))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    # Arrays go round silently where numbers of numpy's would warn.
    value = value + GOLDEN
    value = (value ^ (value >> SHIFTS[0])) * FACTORS[0]
    value = (value ^ (value >> SHIFTS[1])) * FACTORS[1]
    return value ^ (value >> SHIFTS[2])
