"""Interventions against the same edits made by hand, predictions against dense algebra, and rank correlations."""

import numpy as np
import pytest
import torch
from random_transcoders import transcoder

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import attribute
from everyscope.circuits.config import Contrast, Latent, TargetTokens
from everyscope.circuits.graph import LATENT, LOGIT, Graph
from everyscope.circuits.intervene import Edit, intervene, predicted
from everyscope.circuits.validation import Validation, ranks, spearman, validate
from everyscope.sites.splice import splice

CODERS = [transcoder(layer, 32, 48, has_skip=layer == 1) for layer in range(3)]


@pytest.fixture
def graph(gemma2, prompt) -> Graph:
    return attribute(gemma2, CODERS, prompt, target=TargetTokens((7, 9)))


def latents_of(graph: Graph, layer: int) -> list[Latent]:
    nodes = np.flatnonzero((graph.kind == LATENT) & (graph.layer == layer))
    return [Latent(layer, int(graph.position[node]), int(graph.index[node])) for node in nodes]


def activation_of(graph: Graph, latent: Latent) -> float:
    is_it = (graph.layer == latent.layer) & (graph.position == latent.position) & (graph.index == latent.latent)
    return float(graph.activation[is_it & (graph.kind == LATENT)][0])


@torch.no_grad()
def logits_with(model, prompt, added: dict[str, torch.Tensor]) -> np.ndarray:
    every = torch.ones(prompt.shape, dtype=torch.bool)
    with splice(model, {site: lambda x, more=more: x + more for site, more in added.items()}, every):
        return model(input_ids=prompt, use_cache=False).logits[0, -1].numpy()


@pytest.mark.parametrize(("factor", "value"), [(0.0, 0.0), (2.5, 0.0), (0.0, 1.5)], ids=["remove", "scale", "set"])
def test_an_edit_changes_what_the_latent_writes_and_nothing_else(graph, gemma2, prompt, factor, value):
    one, two = latents_of(graph, 0)[5], latents_of(graph, 2)[-3]
    effects = intervene(gemma2, CODERS, graph, [[Edit(one, factor, value)], [Edit(two, factor, value)], []])
    for row, latent in enumerate((one, two)):
        change = (factor - 1) * activation_of(graph, latent) + value
        more = torch.zeros(prompt.shape[1], 32)
        more[latent.position] = change * CODERS[latent.layer].W_dec[latent.latent]
        want = logits_with(gemma2, prompt, {f"mlp_out.{latent.layer}": more})
        np.testing.assert_allclose(effects.logits[row], want, rtol=1e-4, atol=1e-5)
    assert not effects.measured[2].any()
    assert not effects.latents_measured[2].any()
    assert effects.measured[:2].all()


def test_edits_of_one_variant_act_together_and_a_factor_of_1_changes_no_bit(graph, gemma2, prompt):
    several = latents_of(graph, 0)[3:6] + latents_of(graph, 1)[2:4]
    effects = intervene(
        gemma2, CODERS, graph, [[Edit(one, factor=1.0) for one in several], [Edit(one) for one in several[:3]], []]
    )
    assert np.array_equal(effects.logits[0], effects.logits[2])
    more = torch.zeros(prompt.shape[1], 32)
    for one in several[:3]:
        more[one.position] -= activation_of(graph, one) * CODERS[0].W_dec[one.latent]
    np.testing.assert_allclose(effects.logits[1], logits_with(gemma2, prompt, {"mlp_out.0": more}), rtol=1e-4, atol=1e-5)


def test_measured_targets_are_changes_of_logits_before_the_softcap(graph, gemma2, prompt):
    effects = intervene(gemma2, CODERS, graph, [[Edit(latents_of(graph, 1)[4])]])
    contrast = attribute(gemma2, CODERS, prompt, target=Contrast(7, 9))
    both = intervene(gemma2, CODERS, contrast, [[Edit(latents_of(graph, 1)[4])]])
    cap = 3.0
    raw = [cap * np.arctanh(logits.astype(np.float64) / cap) for logits in (effects.logits[0], logits_with(gemma2, prompt, {}))]
    want = [(raw[0] - raw[0].mean())[token] - (raw[1] - raw[1].mean())[token] for token in (7, 9)]
    np.testing.assert_allclose(effects.measured[0], want, atol=1e-4)
    assert both.measured[0, 0] == pytest.approx(want[0] - want[1], abs=1e-4)


def test_with_attention_frozen_another_position_moves_only_by_values(gemma2, prompt):
    graph = attribute(gemma2, CODERS, prompt)
    latent = latents_of(graph, 0)[8]
    free, still = (
        intervene(gemma2, CODERS, graph, [[Edit(latent, 3.0)]], freezes_attention=freezes).latents_measured[0]
        for freezes in (0, 1)
    )
    assert np.abs(free - still).max() > 1e-4
    assert not free[(graph.position < latent.position) | (graph.layer == 0)].any()


def test_with_norms_held_the_graph_is_right_about_the_last_layer(model, family, prompt):
    """Nothing but the final norm lies between it and the logits; free, that norm changes its size too."""
    graph = attribute(model, CODERS, prompt, target=TargetTokens((7, 9)))
    variants = [[Edit(latent)] for latent in latents_of(graph, 2) if latent.position == prompt.shape[1] - 1][:8]
    held, free = (intervene(model, CODERS, graph, variants, freezes_norms=freezes) for freezes in (True, False))
    np.testing.assert_allclose(held.measured, held.predicted, rtol=1e-3, atol=1e-4)
    assert np.abs(free.measured - free.predicted).max() > 1e-3


def test_predictions_are_sums_over_paths(graph):
    """With edits so small that no latent falls to 0: (1 - A)^-1 on changes of activations."""
    latents = latents_of(graph, 0)[2:5]
    nodes = [int(np.flatnonzero((graph.kind == LATENT) & (graph.layer == 0))[place]) for place in (2, 3, 4)]
    found = predicted(graph, [(node, Edit(one, 0.999)) for node, one in zip(nodes, latents, strict=True)])
    scale = np.where(graph.kind == LATENT, graph.activation, 1.0)
    dense = np.zeros((len(graph), len(graph)))
    dense[graph.edges.target, graph.edges.source] = graph.edges.weight / scale[graph.edges.source]
    edited = np.zeros(len(graph))
    edited[nodes] = -0.001 * graph.activation[nodes]
    np.testing.assert_allclose(found, np.linalg.solve(np.eye(len(graph)) - dense, edited), atol=1e-9)
    removed = predicted(graph, [(node, Edit(one, -100.0)) for node, one in zip(nodes, latents, strict=True)])
    is_other = (graph.kind == LATENT) & ~np.isin(np.arange(len(graph)), nodes)
    assert (removed[is_other] >= -graph.activation[is_other]).all()


def test_validation_ranks_latents_by_what_removing_them_does(graph, gemma2, prompt):
    found = validate(gemma2, CODERS, graph, num_latents=12)
    assert len(found.latents) == 12
    each = intervene(gemma2, CODERS, graph, [[Edit(found.latents[4])]])
    np.testing.assert_allclose(found.measured[4], each.measured[0], atol=1e-5)
    np.testing.assert_allclose(found.predicted[4], each.predicted[0])
    assert found.effect[4] == pytest.approx((np.abs(each.measured[0]) * found.weight).sum(), rel=1e-3)
    order = np.argsort(np.argsort(found.influence)), np.argsort(np.argsort(found.effect))
    assert found.rank_correlation == pytest.approx(np.corrcoef(*order)[0, 1])
    assert "12 latents removed" in found.words


def test_spearman():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([9.0, 8, 2, -1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 5])) == 0
    assert ranks(np.array([3.0, 1, 3, 0])).tolist() == [2.5, 1, 2.5, 0]
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)


@pytest.mark.parametrize("latent", [Latent(0, 99, 1), Latent(0, 2, 48), Latent(3, 2, 0)])
def test_edits_of_what_is_not_there_are_refused(graph, gemma2, latent):
    with pytest.raises(ConfigError, match="choose one of these"):
        intervene(gemma2, CODERS, graph, [[Edit(latent)]])


def test_a_graph_of_one_latent_has_no_logits_to_validate(gemma2, prompt, graph):
    of_latent = attribute(gemma2, CODERS, prompt, target=latents_of(graph, 2)[0])
    assert not (of_latent.kind == LOGIT).any()
    with pytest.raises(ConfigError, match="and 0 logits"):
        validate(gemma2, CODERS, of_latent)


def test_passes_that_overflow_are_counted_and_left_out_of_correlations():
    latents = tuple(Latent(0, 1, index) for index in range(4))
    values = np.array([[1.0], [np.nan], [3.0], [4.0]])
    found = Validation(latents, np.array([1.0, 9.0, 3.0, 4.0]), values, np.array([[1.0], [5.0], [3.0], [4.0]]), np.ones(1))
    assert found.rank_correlation == pytest.approx(1)
    assert found.prediction_correlation == pytest.approx(1)
    assert "1 passes overflowed" in found.words
