"""Influence, pruning and scores against dense matrices, which the code never makes."""

import numpy as np
import pytest

from everyscope.circuits.influence import Edges, cumulative, influence, prune, scores, threshold_of

LEVELS = np.array([0] * 12 + [1] * 9 + [2] * 7 + [-1] * 4 + [3] * 3)
IS_ERROR = np.isin(np.arange(35), (3, 14, 15, 25))
IS_TOKEN, IS_TARGET = LEVELS == -1, LEVELS == 3
START = np.where(IS_TARGET, [0.0] * 32 + [0.5, 0.3, 0.1], 0.0)


@pytest.fixture
def dense() -> np.ndarray:
    """weight[target, source]: from lower to higher levels, into no error and no token, two in three."""
    random = np.random.default_rng(3)
    weight = random.normal(size=(35, 35)) * (LEVELS[:, None] > LEVELS) * (random.random((35, 35)) < 0.66)
    weight[IS_ERROR | IS_TOKEN] = 0
    return weight


@pytest.fixture
def edges(dense: np.ndarray) -> Edges:
    target, source = dense.nonzero()
    mixed = np.random.default_rng(4).permutation(len(source))
    return Edges(source[mixed], target[mixed], dense[target, source][mixed])


def normalised(weight: np.ndarray) -> np.ndarray:
    size = np.abs(weight)
    return size / np.maximum(size.sum(1, keepdims=True), 1e-300)


def dense_influence(weight: np.ndarray) -> np.ndarray:
    """w (1 - A)^-1 A."""
    shares = normalised(weight)
    return START @ np.linalg.inv(np.eye(len(shares)) - shares) @ shares


def test_influence_is_the_sum_over_all_paths(dense, edges):
    found = influence(edges, edges.shares(35), LEVELS, START)
    np.testing.assert_allclose(found, dense_influence(dense), rtol=1e-12, atol=1e-15)
    roots = IS_ERROR | IS_TOKEN | (np.abs(dense).sum(1) == 0)
    assert found[roots].sum() == pytest.approx(START.sum())  # all of it comes from somewhere


def test_scores_are_the_papers(dense, edges):
    found = scores(edges, LEVELS, START, IS_TOKEN, IS_ERROR)
    whole, shares = dense_influence(dense), normalised(dense)
    assert found.replacement == pytest.approx(whole[IS_TOKEN].sum() / whole[IS_TOKEN | IS_ERROR].sum())
    weight = whole + START
    assert found.completeness == pytest.approx(((1 - shares[:, IS_ERROR].sum(1)) * weight).sum() / weight.sum())
    assert 0 < found.replacement < 1
    assert 0 < found.completeness < 1


@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.5, 0.7), (1.0, 1.0)])
def test_pruning_keeps_what_the_dense_rule_keeps(dense, edges, node_share, edge_share):
    whole = dense_influence(dense)
    nodes = (whole >= threshold_of(whole, node_share)) | IS_TOKEN | IS_TARGET
    left = dense * nodes * nodes[:, None]
    worth = normalised(left) * (dense_influence(left) + START)[:, None]
    kept = worth >= threshold_of(worth[left != 0], edge_share)
    kept &= left != 0
    is_latent = ~(IS_ERROR | IS_TOKEN | IS_TARGET)
    for _ in range(35):
        nodes &= kept.any(0) | IS_TOKEN | IS_TARGET
        nodes &= kept.any(1) | ~is_latent
        kept &= nodes & nodes[:, None]
    found = prune(edges, LEVELS, START, IS_TOKEN | IS_TARGET, is_latent, node_share, edge_share)
    assert np.array_equal(found.nodes, nodes)
    assert {*zip(edges.target[found.edges], edges.source[found.edges], strict=True)} == {*zip(*kept.nonzero(), strict=True)}


def test_thresholds_and_ranks():
    assert threshold_of(np.array([1.0, 5.0, 3.0, 1.0]), 0.8) == 3.0
    assert threshold_of(np.array([1.0, 5.0, 3.0, 1.0]), 1.0) == 1.0
    assert cumulative(np.array([1.0, 5.0, 2.0, 2.0])).tolist() == [1.0, 0.5, 0.7, 0.9]
