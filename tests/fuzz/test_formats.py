"""A damaged or hostile file works, or is refused in one line that names the problem."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("zstandard", reason="zstandard is not installed")

from tests.fuzz.formats import FORMATS, make_folder
from tests.fuzz.harness import Trial

MUTATIONS = 500


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with make_folder() as path:
        yield path


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_file_works_or_is_refused(folder: Path, name: str) -> None:
    with Trial(name, folder) as trial:
        refused = [trial.attempt(seed) for seed in range(MUTATIONS)]
    # If all mutations are refused, or none is, they test little.
    assert len(set(refused)) == 2 or name in ("micro_batch", "metrics")
