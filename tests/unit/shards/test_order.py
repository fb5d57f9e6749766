import numpy as np
import pytest

from everyscope.shards.order import permutation


@pytest.mark.parametrize("num_rows", [0, 1, 2, 1000])
def test_each_row_once(num_rows):
    assert sorted(permutation(num_rows, 0, 3)) == list(range(num_rows))


def test_seed_and_index_decide_and_nothing_else():
    orders = {(seed, index): tuple(permutation(50, seed, index)) for seed in range(3) for index in range(3)}
    assert len(set(orders.values())) == 9
    assert all(tuple(permutation(50, *key)) == order for key, order in orders.items())


def test_the_order_is_the_same_for_ever():
    assert permutation(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]


def test_neighbours_part():
    places = permutation(100_000, 0)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02  # six standard errors of independent places
