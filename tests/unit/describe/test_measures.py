"""What is measured of latents, against plain loops over dense activations."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from everyscope.describe.codes import joined
from everyscope.describe.columns import KEPT_BITS, rounded
from everyscope.describe.config import DescribeConfig
from everyscope.describe.kernels import EMPTY, keep_least, random_number_of
from everyscope.describe.measures import HISTOGRAM_BINS, POSITION_STRETCHES, QUANTILES, TOP_COFIRING, Measures, text_facts
from everyscope.sites.config import ModelConfig
from everyscope.text.config import TextConfig

SEED = 5
NEAR = 2.0**-KEPT_BITS
"""How far rounding moves what is rounded, relative to it."""


@pytest.fixture
def config(tmp_path, sequences) -> DescribeConfig:
    text = TextConfig(context=sequences.context)
    folders = {name: tmp_path / name for name in ("trained", "scores", "out")}
    return DescribeConfig(model=ModelConfig(), text=text, seed=SEED, window_before=6, window_after=3, **folders)


@pytest.fixture
def facts(sequences):
    return text_facts(sequences, 30, SEED)


@pytest.fixture
def rows(config, codes, facts) -> list[dict]:
    """All columns, latent by latent."""
    found = Measures(config, codes, facts).columns(0, codes.d_sae)
    lists = {name: column.to_pylist() for name, column in found.items()}
    return [{name: values[latent] for name, values in lists.items()} for latent in range(codes.d_sae)]


def test_ranges_and_portions_change_nothing(config, codes, dense, facts, coded):
    whole = Measures(config, codes, facts).columns(0, codes.d_sae)
    for cuts in ([], [7], [1, 100, 101, 300]):
        edges = [0, *cuts, len(dense)]
        pieces = [coded(dense[a:b], a) for a, b in pairwise(edges)]
        again = joined(pieces)
        assert all(np.array_equal(getattr(again, name), getattr(codes, name)) for name in ("starts", "places", "values"))
    parts = [Measures(config, codes, facts).columns(first, min(first + 7, 40)) for first in range(0, 40, 7)]
    for name, column in whole.items():
        assert [value for part in parts for value in part[name].to_pylist()] == column.to_pylist(), name


def test_activations_are_counted_exactly(rows, dense, sequences):
    for row, f in zip(rows, dense.T, strict=True):
        firing = f[f > 0].astype(np.float64)
        assert row["firings"] == len(firing)
        assert row["frequency"] == np.float32(len(firing) / sequences.mask.sum())
        if not len(firing):
            assert row["mean_activation"] is row["max_activation"] is None
            assert row["histogram"] == row["quantiles"] == row["examples"] == row["tokens"] == row["cofiring"] == []
            continue
        assert row["mean_activation"] == pytest.approx(math.fsum(firing) / len(firing), rel=1e-7)
        assert row["max_activation"] == firing.max()
        largest = Fraction(firing.max())
        bins = [min(HISTOGRAM_BINS - 1, math.floor(Fraction(value) / largest * HISTOGRAM_BINS)) for value in firing]
        assert row["histogram"] == np.bincount(bins, minlength=HISTOGRAM_BINS).tolist()
        assert row["quantiles"] == pytest.approx(np.quantile(firing, QUANTILES).tolist(), rel=NEAR)


def test_position_profiles_are_frequencies(rows, dense, sequences):
    position = np.arange(len(dense)) % sequences.context
    for row, f in zip(rows, dense.T, strict=True):
        for stretch, share in enumerate(row["position_profile"]):
            here = (position * POSITION_STRETCHES // sequences.context == stretch) & sequences.mask.ravel()
            assert share is None if not here.any() else share == pytest.approx((f[here] > 0).mean(), rel=NEAR)


def test_token_statistics(rows, dense, sequences):
    token, mask = sequences.input_ids.ravel(), sequences.mask.ravel()
    for row, f in zip(rows, dense.T, strict=True):
        counts = np.bincount(token[f > 0], minlength=30)
        order = sorted(np.flatnonzero(counts), key=lambda number: (-counts[number], number))[:10]
        assert [(its["token"], its["count"]) for its in row["tokens"]] == [(number, counts[number]) for number in order]
        for its in row["tokens"]:
            assert its["share"] == pytest.approx(its["count"] / (mask & (token == its["token"])).sum(), rel=NEAR)
        if counts.sum():
            shares = counts[counts > 0] / counts.sum()
            assert row["token_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=NEAR, abs=1e-9)


def best_rule_accuracy(fires: np.ndarray, token: np.ndarray, learn: np.ndarray, test: np.ndarray) -> float:
    """By going through all tokens: S holds those whose balanced accuracy alone, on `learn`, is above one half."""
    chosen = [t for t in np.unique(token) if accuracy(fires[learn], token[learn] == t) > 0.5]
    return accuracy(fires[test], np.isin(token[test], chosen))


def accuracy(fires: np.ndarray, says: np.ndarray) -> float:
    return (says[fires].mean() + (~says[~fires]).mean()) / 2


def test_predictability_is_that_of_the_best_rule_on_other_documents(rows, dense, facts, sequences):
    token, mask = sequences.input_ids.ravel(), sequences.mask.ravel()
    assert set(facts.half[mask]) == {0, 1}
    assert not set(sequences.document.ravel()[facts.half == 0]) & set(sequences.document.ravel()[facts.half == 1])
    for row, f in zip(rows, dense.T, strict=True):
        fires = f > 0
        halves = [facts.half == number for number in (0, 1)]
        if any(not fires[half].any() or fires[half].all() for half in halves):
            assert row["token_predictability"] is None
            continue
        want = np.mean([best_rule_accuracy(fires, token, halves[number], halves[1 - number]) for number in (0, 1)])
        assert row["token_predictability"] == pytest.approx(want, rel=2 * NEAR)
    assert rows[7]["token_predictability"] == 1  # it fires exactly on one token
    assert rows[7]["token_entropy"] == 0


def test_cofiring_is_the_strongest_correlation(rows, dense, sequences):
    fires = (dense > 0)[sequences.mask.ravel()].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.nan_to_num(np.corrcoef(fires.T))
    together = fires.T @ fires
    for latent, row in enumerate(rows):
        others = [other for other in range(len(rows)) if other != latent and phi[latent, other] > 1e-12]
        want = sorted(others, key=lambda other: (-round(phi[latent, other], 12), other))[:TOP_COFIRING]
        assert [its["latent"] for its in row["cofiring"]] == want
        assert [its["count"] for its in row["cofiring"]] == [together[latent, other] for other in want]
        assert [its["phi"] for its in row["cofiring"]] == pytest.approx([phi[latent, other] for other in want], rel=NEAR)
    assert rows[5]["cofiring"][0] == {"latent": 6, "count": rows[5]["firings"], "phi": 1.0}


def test_the_strongest_examples_come_from_different_blocks_and_documents(rows, dense, config, sequences):
    context, document = sequences.context, sequences.document.ravel()
    for row, f in zip(rows, dense.T, strict=True):
        top = [its for its in row["examples"] if its["group"] == 0]
        places = [its["sequence"] * context + its["position"] for its in top]
        want, beside = [], dict.fromkeys(range(8), 0)
        for place in sorted(np.flatnonzero(f), key=lambda place: (-f[place], place)):
            is_new = place // context not in {other // context for other in want}
            if is_new and beside[document[place]] < config.examples_per_document and len(want) < config.top_examples:
                want.append(place)
                beside[document[place]] += 1
        assert places == want


def test_quantile_examples_are_of_their_fifth_of_the_firings(rows, dense, config, sequences):
    for latent, (row, f) in enumerate(zip(rows, dense.T, strict=True)):
        order = sorted(np.flatnonzero(f), key=lambda place: (-f[place], place))
        for group in range(1, 6):
            its = [example for example in row["examples"] if example["group"] == group]
            places = [example["sequence"] * sequences.context + example["position"] for example in its]
            fifth = order[(group - 1) * len(order) // 5 : group * len(order) // 5]
            least: dict[int, tuple[int, int]] = {}
            for place in fifth:
                number = (int(random_number_of(SEED, latent, int(place))), int(place))
                least[place // sequences.context] = min(number, least.get(place // sequences.context, number))
            assert places == [place for _, place in sorted(least.values())[: config.group_examples]]
            assert all(f[place] > 0 for place in places)


@pytest.mark.parametrize(("top", "group", "want"), [(3, 0, {0}), (0, 2, {1, 2, 3, 4, 5}), (0, 0, set())])
def test_each_kind_of_example_may_be_left_out(config, codes, facts, top, group, want):
    config = config.model_copy(update={"top_examples": top, "group_examples": group})
    found = Measures(config, codes, facts).columns(0, codes.d_sae)["examples"].to_pylist()
    assert {example["group"] for row in found for example in row} == want


def test_windows_show_the_activations_and_stay_in_their_block(rows, dense, config, sequences):
    for row, f in zip(rows, dense.T, strict=True):
        for example in row["examples"]:
            start, length = example["start"], len(example["activations"])
            assert start == max(1, example["position"] - config.window_before)  # 0 holds BOS
            assert start + length == min(sequences.context, example["position"] + config.window_after + 1)
            begin = example["sequence"] * sequences.context + start
            assert example["activations"] == f[begin : begin + length].astype(np.float16).tolist()


def test_activations_beyond_float16_stay_finite_and_firing(config, facts, sequences, coded):
    f = np.zeros((sequences.input_ids.size, 2), np.float32)
    f[5], f[30] = 1e30, 1e-30
    found = Measures(config, coded(f), facts).columns(0, 2)["examples"].to_pylist()[0]
    peaks = {example["activations"][example["position"] - example["start"]] for example in found}
    assert peaks == {65504.0, 2.0**-24}


@pytest.mark.parametrize("room", [0, 1, 3])
def test_keep_least_keeps_the_least_of_each_block(room):
    random = np.random.default_rng(room)
    for _ in range(200):
        kept, hashes = np.full(room, EMPTY), np.zeros(room, np.uint64)
        drawn = [(int(place), int(number)) for place, number in random.integers(0, 60, (random.integers(0, 40), 2))]
        for place, number in drawn:
            keep_least(kept, hashes, place, np.uint64(number), 10)
        least: dict[int, int] = {}
        for place, number in drawn:
            least[place // 10] = min(number, least.get(place // 10, number))
        assert hashes[kept != EMPTY].tolist() == sorted(least.values())[:room]


def test_scattered_numbers_are_fair():
    """The least of ten is each of them equally often, whatever the latent and place: within five standard errors."""
    least = [int(np.argmin([int(random_number_of(1, latent, place)) for place in range(10)])) for latent in range(2000)]
    assert np.abs(np.bincount(least, minlength=10) - 200).max() < 5 * math.sqrt(180)
    assert len({int(random_number_of(seed, latent, 3)) for seed in range(20) for latent in range(20)}) == 400


def test_rounding_keeps_three_digits():
    values = np.array([0.0, 1.0, -1.0, 1.2345678, 1e-30, -9.87654e20, np.nan])
    got = rounded(values)
    np.testing.assert_allclose(got, values, rtol=NEAR)
    assert got[:3].tolist() == [0, 1, -1]
    assert not (got[:-1].view(np.uint32) & ((1 << (24 - KEPT_BITS)) - 1)).any()
