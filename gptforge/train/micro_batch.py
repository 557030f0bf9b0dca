"""How many windows go through a GPU at once: estimated, tried out, remembered."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from gptforge.errors import RunError
from gptforge.files import atomic_write, read_text

MAX_MEMORY_FRACTION = 0.92
"""Share of the free memory that an estimate may fill: the allocator wastes a little."""


def find_micro_batch(
    max_size: int,
    *,
    estimate: Callable[[int], int],
    free_memory: int | None,
    fits: Callable[[int], bool],
    cache_path: Path | None,
    key: str,
) -> int:
    """The largest of most, most / 2, most / 4, ... that fits into memory.

    Args:
        most: windows to begin with.
        estimate: bytes that so many windows take.
        free: bytes there are; None where that is not known.
        fits: tries so many windows out.
        remembered: JSON file with earlier answers, or None; one that is broken or cannot be written
            does no harm.
        key: what the answer depends on: shape, precision, device, versions.

    Raises:
        RunError: if not even one window fits.
    """
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    answers = _read(cache_path) if cache_path else {}
    windows = min(max_size, answers.get(digest, max_size))
    while (
        windows > 1
        and free_memory is not None
        and estimate(windows) > MAX_MEMORY_FRACTION * free_memory
    ):
        windows = -(-windows // 2)
    # What other programs leave free today says nothing about tomorrow.
    is_lasting = (
        free_memory is None
        or windows == max_size
        or estimate(2 * windows) <= MAX_MEMORY_FRACTION * free_memory
    )
    while not fits(windows):
        if windows == 1:
            raise RunError(
                f"not even one window fits into the {(free_memory or 0) / 1e9:.1f} GB that are free: use "
                "--activation_checkpointing true, a smaller --context_length or a smaller model"
            )
        windows = -(-windows // 2)
    if cache_path and is_lasting and answers.get(digest) != windows:
        _write(cache_path, {**answers, digest: windows})
    return windows


def _read(path: Path) -> dict[str, int]:
    try:
        answers = json.loads(read_text(path))
        return {key: value for key, value in answers.items() if type(value) is int and value > 0}
    except Exception:
        # Broken or absent: what fits is found again.
        return {}


def _write(path: Path, answers: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(answers))
    except OSError:
        # A home that cannot be written costs a second at the next start, nothing more.
        return
