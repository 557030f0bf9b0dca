"""Where other processes find this checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path(*first: Path) -> str:
    """PYTHONPATH with `first`, this checkout, and whatever was in it before."""
    places = [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, places))
