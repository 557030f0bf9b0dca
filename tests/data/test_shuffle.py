import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.shuffle import permute, shuffled_index


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_each_index_once_an_epoch(n, key) -> None:
    image = permute(np.arange(n), n, keys=np.uint64(key))
    assert sorted(image) == list(range(n))


@given(st.integers(1, 500), st.integers(0, 2**62), st.integers(0, 5000), st.integers(1, 300))
def test_random_access(n, seed, start, length) -> None:
    full = shuffled_index(np.arange(start + length), n, seed=seed, shuffle=True)
    part = shuffled_index(np.arange(start, start + length), n, seed=seed, shuffle=True)
    np.testing.assert_array_equal(full[start:], part)


def test_no_shuffle_keeps_the_order() -> None:
    order = shuffled_index(np.arange(7), 3, seed=1, shuffle=False)
    assert order.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    orders = [shuffled_index(np.arange(n), n, seed=seed, shuffle=True) for seed in (1, 2)]
    orders.append(shuffled_index(np.arange(n, 2 * n), n, seed=1, shuffle=True))
    for i in range(3):
        for j in range(i):
            # Two random orders agree at about one position.
            assert (orders[i] == orders[j]).sum() < 10


def test_order_never_changes() -> None:
    # Old checkpoints rely on these numbers.
    order = shuffled_index(np.arange(12), 5, seed=1337, shuffle=True)
    assert order.tolist() == [2, 1, 3, 4, 0, 2, 3, 0, 1, 4, 0, 1]


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_first_index_is_uniform(n) -> None:
    indices = [shuffled_index(np.arange(n), n, seed=seed, shuffle=True)[0] for seed in range(300)]
    assert abs(np.mean(indices) - (n - 1) / 2) < 0.12 * n
