import pytest

from gptforge.builders.memory_fit import find_micro_batch
from gptforge.errors import RunError


def find(limit: int, tried: list[int], *, free_memory: int = 10**12) -> int:
    """Search from 32 sequences of 1 GB each, of which `limit` fit."""

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    return find_micro_batch(32, estimate=lambda n: n * 10**9, free_memory=free_memory, fits=fits)


def test_largest_that_fits_is_found() -> None:
    tried: list[int] = []
    assert find(9, tried) == 8
    assert tried == [32, 16, 8]


def test_the_estimate_rules_out_what_cannot_fit() -> None:
    tried: list[int] = []
    assert find(32, tried, free_memory=10 * 10**9) == 8
    assert tried == [8]


def test_nothing_fits() -> None:
    with pytest.raises(RunError, match="not even one sequence"):
        find(0, [])
