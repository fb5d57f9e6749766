import itertools
import random

import pytest

from everyscope.suite.ties import estimate, is_tie, rank_spans


def test_ties_are_not_transitive_and_spans_say_so():
    estimates = [(1.0, 0.8, 1.2), (1.3, 1.1, 1.5), (1.6, 1.4, 1.8), (9.0, 8.0, 10.0)]
    assert rank_spans(estimates) == [(1, 2), (1, 3), (2, 3), (4, 4)]
    assert rank_spans(estimates, is_more_better=True) == [(3, 4), (2, 4), (2, 3), (1, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_a_span_holds_every_place_that_values_within_the_intervals_can_take(seed: int):
    generator = random.Random(seed)
    estimates = [(m, m - h, m + h) for m, h in ((generator.random(), 0.15 * generator.random()) for _ in range(5))]
    seen = [set() for _ in estimates]
    for ends in itertools.product((1, 2), repeat=5):
        values = [its[end] for its, end in zip(estimates, ends, strict=True)]
        for number, value in enumerate(values):
            seen[number].add(1 + sum(other < value for other in values))
    for (first, last), places in zip(rank_spans(estimates), seen, strict=True):
        assert (first, last) == (min(places), max(places))


def test_exact_values_have_places_and_touching_intervals_tie():
    assert rank_spans([estimate(2.0, None), estimate(1.0, None)]) == [(2, 2), (1, 1)]
    assert is_tie((1.0, 0.0, 2.0), (3.0, 2.0, 4.0))
    assert not is_tie((1.0, 0.0, 2.0), (3.0, 2.1, 4.0))
