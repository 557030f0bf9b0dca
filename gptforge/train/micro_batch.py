"""How many windows go through a GPU at once: estimated, tried out, remembered."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from gptforge.errors import RunError
from gptforge.files import read_small, write_atomic

HEADROOM = 0.92
"""Share of the free memory that an estimate may fill: the allocator wastes a little."""


def find_micro_batch(
    most: int,
    *,
    estimate: Callable[[int], int],
    free: int | None,
    fits: Callable[[int], bool],
    remembered: Path | None,
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
    answers = _read(remembered) if remembered else {}
    windows = min(most, answers.get(digest, most))
    while windows > 1 and free is not None and estimate(windows) > HEADROOM * free:
        windows = -(-windows // 2)
    # What other programs leave free today says nothing about tomorrow.
    is_lasting = free is None or windows == most or estimate(2 * windows) <= HEADROOM * free
    while not fits(windows):
        if windows == 1:
            raise RunError(
                f"not even one window fits into the {(free or 0) / 1e9:.1f} GB that are free: use "
                "--activation_checkpointing true, a smaller --context_length or a smaller model"
            )
        windows = -(-windows // 2)
    if remembered and is_lasting and answers.get(digest) != windows:
        _write(remembered, {**answers, digest: windows})
    return windows


def _read(path: Path) -> dict[str, int]:
    try:
        answers = json.loads(read_small(path))
        return {key: value for key, value in answers.items() if type(value) is int and value > 0}
    except Exception:
        # Broken or absent: what fits is found again.
        return {}


def _write(path: Path, answers: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(answers))
    except OSError:
        # A home that cannot be written costs a second at the next start, nothing more.
        return
