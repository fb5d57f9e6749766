import json
import math

import numpy as np
import pytest

from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.statistics import Sums, SumsRecord
from everyscope.base.errors import NonFinite

CONTEXT = 16


def oracle(rows: np.ndarray, position: np.ndarray) -> dict:
    """Every figure from exactly rounded sums."""
    squares = [math.fsum(float(x) ** 2 for x in row) for row in rows]
    at = [[square for square, here in zip(squares, position, strict=True) if here == p] for p in range(CONTEXT)]
    return {
        "count": len(rows),
        "mean": [math.fsum(map(float, column)) / len(rows) for column in rows.T],
        "mean_squared_norm": math.fsum(squares) / len(rows),
        "scale": math.sqrt(math.fsum(squares) / len(rows)),
        "position_count": [len(found) for found in at],
        "position_mean_squared_norm": [math.fsum(found) / len(found) if found else 0.0 for found in at],
    }


def test_statistics_of_shards_equal_a_float64_oracle(written):
    want = oracle(written.rows.float().numpy(), written.position.numpy())
    shards = Shards(written.folder)
    got = shards.statistics.record().as_json()
    assert got.pop("norms")  # tests/unit/activations/shards/test_norms.py
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=0, err_msg=name)
    assert got["position_count"] == want["position_count"]


@pytest.mark.parametrize("cut", [0, 1, 4999, 5000, 9000])
def test_merging_equals_counting_all_at_once(cut):
    random = np.random.default_rng(0)
    rows, position = random.normal(1, 1, (9000, 3)).astype(np.float32), random.integers(0, CONTEXT, 9000)
    parts = [Sums(3, CONTEXT) for _ in range(3)]
    parts[0].add(rows, position)
    parts[1].add(rows[:cut], position[:cut])
    parts[2].add(rows[cut:], position[cut:])
    parts[1].merge(parts[2])
    np.testing.assert_allclose(parts[1].total, parts[0].total, rtol=1e-12)
    np.testing.assert_array_equal(parts[1].position_count, parts[0].position_count)
    np.testing.assert_allclose(parts[1].position_squared_norm, parts[0].position_squared_norm, rtol=1e-12)


def test_json_keeps_every_bit(written):
    sums = Sums(3, CONTEXT)
    sums.add(np.random.default_rng(0).normal(size=(99, 3)).astype(np.float32), np.arange(99) % CONTEXT)
    back = Sums.of_record(SumsRecord.model_validate(json.loads(json.dumps(sums.record().as_json()))))
    assert back.record() == sums.record()
    statistics = Shards(written.folder).statistics
    assert json.loads(json.dumps(statistics.record().as_json())) == statistics.record().as_json()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 4095, 4096, 4999])
def test_the_first_bad_row_is_named_and_nothing_added(bad, row):
    rows, sums = np.ones((5000, 2), np.float32), Sums(2, CONTEXT)
    rows[row:, 1] = bad
    with pytest.raises(NonFinite, match=f"^row {row}:"):
        sums.add(rows, np.zeros(5000, np.int64))
    assert sums.record() == Sums(2, CONTEXT).record()
