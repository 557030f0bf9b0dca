"""Find the largest micro-batch that fits into memory: estimate, try, and cache the result."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from gptforge.errors import RunError
from gptforge.files import atomic_write, read_text

MAX_MEMORY_FRACTION = 0.92
"""Fraction of the free memory that an estimate may fill; the rest is for fragmentation."""


def find_micro_batch(
    max_size: int,
    *,
    estimate: Callable[[int], int],
    free_memory: int | None,
    fits: Callable[[int], bool] = lambda sequences: True,
    cache_path: Path | None = None,
    key: str = "",
) -> int:
    """Return the first of max_size, max_size / 2, max_size / 4, ... that fits into memory.

    Args:
        max_size: sequences to start with.
        estimate: from sequences in a micro-batch to bytes of memory.
        free_memory: bytes; None if unknown.
        fits: runs a micro-batch of so many sequences; False if memory ran out.
        cache_path: JSON file with earlier results, or None. It may be corrupt or read-only.
        key: everything the result depends on: shape, precision, device, versions.

    Raises:
        RunError: if not even one sequence fits.
    """
    # Keys are long, and only compared.
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = _read_cache(cache_path) if cache_path else {}
    size = min(max_size, cache.get(digest, max_size))
    usable = None if free_memory is None else MAX_MEMORY_FRACTION * free_memory
    # Estimates are free, each trial below costs a forward and backward pass.
    while size > 1 and usable is not None and estimate(size) > usable:
        size = -(-size // 2)
    # Not cached if the size is small only because other programs hold memory now.
    is_cacheable = usable is None or size == max_size or estimate(2 * size) <= usable
    while not fits(size):
        if size == 1:
            raise RunError(
                f"not even one sequence fits into the {(free_memory or 0) / 1e9:.1f} GB of free "
                "memory: use --activation_checkpointing true, a smaller --context_length or a "
                "smaller model"
            )
        size = -(-size // 2)
    if cache_path and is_cacheable and cache.get(digest) != size:
        _write_cache(cache_path, {**cache, digest: size})
    return size


def _read_cache(path: Path) -> dict[str, int]:
    try:
        cache = json.loads(read_text(path))
        return {key: value for key, value in cache.items() if type(value) is int and value > 0}
    except Exception:
        # Missing or corrupt: search again.
        return {}


def _write_cache(path: Path, cache: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(cache))
    except OSError:
        # Read-only home directory: the next start searches again, which takes about a second.
        return
