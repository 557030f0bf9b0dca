"""Find the largest micro-batch that fits into memory: estimate, then try."""

from collections.abc import Callable

from gptforge.errors import RunError

MAX_MEMORY_FRACTION = 0.92
"""Fraction of the free memory that an estimate may fill; the rest is for fragmentation."""


def find_micro_batch(
    max_size: int,
    *,
    estimate: Callable[[int], int],
    free_memory: int | None,
    fits: Callable[[int], bool] = lambda sequences: True,
) -> int:
    """Return the first of max_size, max_size / 2, max_size / 4, ... that fits into memory.

    Args:
        max_size: sequences to start with.
        estimate: from sequences in a micro-batch to bytes of memory.
        free_memory: bytes; None if unknown.
        fits: runs a micro-batch of so many sequences; False if memory ran out.
    """
    size = max_size
    if free_memory is not None:
        # Estimates are free, each trial below costs a forward and backward pass.
        while size > 1 and estimate(size) > MAX_MEMORY_FRACTION * free_memory:
            size = -(-size // 2)
    while not fits(size):
        if size == 1:
            raise RunError(
                f"not even one sequence fits into the {(free_memory or 0) / 1e9:.1f} GB of free "
                "memory: use --activation_checkpointing true, a smaller --context_length or a "
                "smaller model"
            )
        size = -(-size // 2)
    return size
