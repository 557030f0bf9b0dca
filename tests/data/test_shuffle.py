import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptforge.data.shuffle import permute, shuffled_index


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_window_comes_exactly_once_an_epoch(n, key) -> None:
    image = permute(np.arange(n), n, keys=np.uint64(key))
    assert sorted(image) == list(range(n))


@given(st.integers(1, 500), st.integers(0, 2**62), st.integers(0, 5000), st.integers(1, 300))
def test_any_place_can_be_jumped_to(n, seed, start, length) -> None:
    whole = shuffled_index(np.arange(start + length), n, seed=seed, shuffle=True)
    jumped = shuffled_index(np.arange(start, start + length), n, seed=seed, shuffle=True)
    np.testing.assert_array_equal(whole[start:], jumped)


def test_without_shuffling_the_order_is_the_texts() -> None:
    order = shuffled_index(np.arange(7), 3, seed=1, shuffle=False)
    assert order.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_epochs_and_seeds_give_different_orders() -> None:
    n = 1000
    orders = [shuffled_index(np.arange(n), n, seed=seed, shuffle=True) for seed in (1, 2)]
    orders.append(shuffled_index(np.arange(n, 2 * n), n, seed=1, shuffle=True))
    for i in range(3):
        for j in range(i):
            # Two random orders agree in about one place.
            assert (orders[i] == orders[j]).sum() < 10


def test_the_order_stays_the_same_for_ever() -> None:
    # Checkpoints of old runs rely on these numbers.
    order = shuffled_index(np.arange(12), 5, seed=1337, shuffle=True)
    assert order.tolist() == [2, 1, 3, 4, 0, 2, 3, 0, 1, 4, 0, 1]


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_neighbours_are_scattered(n) -> None:
    places = np.concatenate(
        [shuffled_index(np.arange(n), n, seed=s, shuffle=True) for s in range(300)]
    )
    firsts = places.reshape(300, n)[:, 0]
    # Over many seeds the first window is spread over the text: its mean is near the middle.
    assert abs(firsts.mean() - (n - 1) / 2) < 0.12 * n
