"""PYTHONPATH for child processes."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_path(*first: Path) -> str:
    """PYTHONPATH with `first`, this checkout, and its previous value."""
    paths = [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))
