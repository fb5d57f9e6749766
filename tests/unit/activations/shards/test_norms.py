import json
import math

import numpy as np
import pytest

from everyscope.activations.shards.norms import BINS_PER_OCTAVE, MAX_BINS, TAIL_BINS, Norms, bins_of, lower_edge, record_bytes
from everyscope.activations.shards.statistics import Statistics, StatisticsRecord, Sums

D_IN, CONTEXT = 7, 32


def rows_of(seed: int, count: int = 6000, massive: int = 20, factor: float = 100.0) -> np.ndarray:
    """Rows of norm about 4 with a mean, of which `massive` at random places are `factor` times as large in dimension 3."""
    random = np.random.default_rng(seed)
    rows = random.normal(1, 1, (count, D_IN)).astype(np.float32)
    rows[random.choice(count, massive, replace=False), 3] = 4 * factor
    return rows


def sums_of(rows: np.ndarray, cuts: tuple[int, ...] = ()) -> Sums:
    whole = Sums(D_IN, CONTEXT)
    for start, stop in zip((0, *cuts), (*cuts, len(rows)), strict=True):
        part = Sums(D_IN, CONTEXT)
        part.add(rows[start:stop], np.arange(start, stop) % CONTEXT, np.arange(start, stop) // CONTEXT)
        whole.merge(part)
    return whole


@pytest.mark.parametrize("max_norm", [2.0, 3.0, 5.0, 8.0, 20.0, None])
@pytest.mark.parametrize("cuts", [(), (1, 5999), (700, 3000)])
@pytest.mark.parametrize("factor", [6.0, 100.0, 1000.0])
def test_usual_rows_have_the_figures_of_the_rows_below_the_limit(max_norm, cuts, factor):
    rows = rows_of(0, factor=factor)
    statistics = sums_of(rows, cuts).statistics()
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    usual = statistics.usual(max_norm)
    assert statistics.norms.median() == pytest.approx(np.median(norms), rel=0.1)
    if max_norm is None:
        assert usual.norm_limit == math.inf
    else:
        assert usual.norm_limit / (max_norm * np.median(norms)) == pytest.approx(1, abs=0.2)
    kept = wide[norms <= usual.norm_limit]
    assert usual.count == len(kept)
    np.testing.assert_allclose(usual.mean, kept.mean(0), rtol=1e-9)
    assert usual.mean_squared_norm == pytest.approx(np.square(kept).sum(1).mean(), rel=1e-9)
    assert usual.spread == pytest.approx(math.sqrt(np.square(kept - kept.mean(0)).sum(1).mean()), rel=1e-9)


def test_what_is_left_out_is_named():
    rows = rows_of(1)
    massive = sums_of(rows).statistics().massive(8.0)
    (where,) = np.nonzero(np.linalg.norm(rows, axis=1) > 50)
    assert massive is not None
    assert massive.count == len(where) == 20
    assert massive.share_of_rows == 20 / 6000
    assert massive.share_of_squares == pytest.approx(
        np.square(rows[where].astype(np.float64)).sum() / np.square(rows.astype(np.float64)).sum()
    )
    assert massive.coordinates[0][0] == 3
    assert massive.coordinates[0][1] > 0.99
    assert set(massive.places) <= {(row // CONTEXT, row % CONTEXT) for row in where.tolist()}
    assert len(massive.places) == 16
    assert sums_of(rows_of(1, massive=0)).statistics().massive(8.0) is None


def test_more_than_one_row_in_a_thousand_is_still_massive():
    """A quantile of the norms would be one of theirs; a multiple of the median is not."""
    rows = rows_of(2, massive=300)
    usual = sums_of(rows).statistics().usual(8.0)
    assert usual.count == 5700
    assert usual.norm_limit < 50


def test_records_keep_every_bit():
    statistics = sums_of(rows_of(3)).statistics()
    record = StatisticsRecord.model_validate(json.loads(json.dumps(statistics.record().as_json())))
    back = Statistics.of_record(record)
    assert back.record() == statistics.record()
    np.testing.assert_array_equal(back.usual(8.0).mean, statistics.usual(8.0).mean)


def test_rows_of_zero_have_no_limit():
    rows = rows_of(4)
    rows[:4000] = 0
    assert sums_of(rows).statistics().usual(8.0).norm_limit == math.inf


def test_a_heavy_tail_takes_bounded_room():
    random = np.random.default_rng(0)
    rows = (random.normal(size=(9000, D_IN)) * np.exp(5 * random.normal(size=(9000, 1)))).astype(np.float32)
    sums = sums_of(rows, (3000, 4000))
    assert len(sums.norms.bins) == MAX_BINS
    assert len(sums.norms.tail) == TAIL_BINS
    assert sum(count for count, _ in sums.norms.bins.values()) == 9000
    assert 0.3 < len(json.dumps({"norms": sums.norms.record().as_json()}, indent=4)) / record_bytes(D_IN) < 1
    usual, norms = sums.statistics().usual(8.0), np.linalg.norm(rows.astype(np.float64), axis=1)
    assert usual.count == (norms <= usual.norm_limit).sum()
    assert usual.mean_squared_norm == pytest.approx(np.square(norms[norms <= usual.norm_limit]).mean(), rel=1e-9)


def test_bins_begin_at_their_edges():
    edges = np.array([lower_edge(number) for number in range(-40, 40)])
    np.testing.assert_array_equal(bins_of(np.square(edges * 1.0001)), np.arange(-40, 40))
    np.testing.assert_array_equal(bins_of(np.square(edges * 0.9999)), np.arange(-41, 39))
    assert lower_edge(BINS_PER_OCTAVE) == 2
    assert Norms().limit(8.0) == math.inf
