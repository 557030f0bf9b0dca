"""A stranger's file is refused in one line that names what is wrong, or it works."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("zstandard", reason="zstandard is not installed")

from tests.fuzz.formats import FORMATS, furnished
from tests.fuzz.harness import Trial

MUTATIONS = 2000


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with furnished() as place:
        yield place


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_refused_in_words_or_work(folder: Path, name: str) -> None:
    with Trial(name, folder) as trial:
        refused = [trial.attempt(seed) for seed in range(MUTATIONS)]
    # Mutations that are all refused, or none, would not test much.
    assert len(set(refused)) == 2 or name in ("answers", "metrics")
