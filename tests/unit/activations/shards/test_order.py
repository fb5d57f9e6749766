import numpy as np
import pytest

from everyscope.activations.shards.order import permutation, scattered


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


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 16, 17, 100, 4097, 50_001])
@pytest.mark.parametrize("seed", [0, 7])
def test_scattering_is_a_permutation_whatever_the_size(num_rows, seed):
    places = scattered(np.arange(num_rows), num_rows, seed)
    assert sorted(places) == list(range(num_rows))
    parts = [scattered(part, num_rows, seed) for part in np.array_split(np.arange(num_rows), 3)]
    assert np.array_equal(np.concatenate(parts), places)


def test_scattering_is_the_same_for_ever_and_depends_on_the_seed():
    assert scattered(np.arange(8), 1000, 1).tolist() == [30, 613, 604, 612, 84, 89, 386, 543]
    assert not np.array_equal(scattered(np.arange(100), 100, 1), scattered(np.arange(100), 100, 2))


def test_scattering_spreads_each_stretch_over_everything():
    places = scattered(np.arange(100_000), 100_000, 0)
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02  # six standard errors of independent places
    table = np.histogram2d(np.arange(100_000), places, bins=20)[0]
    squares = float(((table - 250) ** 2 / 250).sum())
    assert 361 - 5 * 27 < squares < 361 + 5 * 27  # chi squared of 19 x 19 degrees of freedom, standard deviation 27
