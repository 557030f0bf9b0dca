import pytest

from gptforge.errors import RunError
from gptforge.train.micro_batch_search import find_micro_batch


def find(tmp_path, limit: int, *, free_memory: int = 10**12, tried: list | None = None) -> int:
    """Search from 32 sequences of 1 GB each, of which `limit` fit."""

    def fits(size: int) -> bool:
        if tried is not None:
            tried.append(size)
        return size <= limit

    return find_micro_batch(
        32, estimate=lambda n: n * 10**9, free_memory=free_memory, fits=fits,
        cache_path=tmp_path / "cache" / "answers.json", key=f"{free_memory}",
    )  # fmt: skip


def test_largest_that_fits_is_found_and_cached(tmp_path) -> None:
    first: list[int] = []
    assert find(tmp_path, 9, tried=first) == 8
    assert first == [32, 16, 8]
    second: list[int] = []
    assert find(tmp_path, 9, tried=second) == 8
    assert second == [8]
    # The estimate rules out what cannot fit.
    estimated: list[int] = []
    assert find(tmp_path, 32, free_memory=10 * 10**9, tried=estimated) == 8
    assert estimated == [8]
    (tmp_path / "cache" / "answers.json").write_text("[broken")
    assert find(tmp_path, 9) == 8


def test_nothing_fits(tmp_path) -> None:
    with pytest.raises(RunError, match="not even one sequence"):
        find(tmp_path, 0)
