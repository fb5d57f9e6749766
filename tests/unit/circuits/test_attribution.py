"""Graphs: what they hold, what was left out of them, and their targets."""

import copy

import numpy as np
import pytest
import torch
from random_transcoders import ReluMlp, relu_transcoder, transcoder

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import attribute
from everyscope.circuits.config import AttributionConfig, Contrast, Latent, TargetTokens
from everyscope.circuits.graph import ERROR, LATENT, LOGIT, TOKEN, Graph
from tests.unit.sites.conftest import BOS

CODERS = [transcoder(layer, 32, 48, has_skip=layer == 1) for layer in range(3)]


@pytest.fixture
def graph(gemma2, prompt) -> Graph:
    return attribute(gemma2, CODERS, prompt)


def gap(graph: Graph) -> float:
    """How far edges, rest and biases miss the values of the nodes whose inputs are known."""
    sent = np.bincount(graph.edges.target, graph.edges.weight, len(graph))
    return float(np.abs(sent + graph.rest + graph.bias - graph.pre).max())


def names(graph: Graph) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(graph, name).tolist() for name in ("kind", "layer", "position", "index")), strict=True))


def edges_by_name(graph: Graph) -> dict[tuple, float]:
    known = names(graph)
    return {
        (known[source], known[target]): weight
        for source, target, weight in zip(graph.edges.source, graph.edges.target, graph.edges.weight, strict=True)
    }


def test_a_graph_accounts_for_every_node_however_much_is_left_out(graph, gemma2, prompt):
    fewer = AttributionConfig(max_latents=40, edges_per_node=30)
    some = attribute(gemma2, CODERS, prompt, config=fewer)
    assert (some.kind == LATENT).sum() == 40
    assert np.bincount(some.edges.target).max() <= 30
    assert some.rest_size.max() > 0
    for one in (graph, some, graph.pruned(), some.pruned(0.5, 0.5)):
        assert gap(one) < 1e-4
        assert one.largest_violation < 1e-5
    assert graph.coverage == pytest.approx(1)
    assert 0.1 < some.coverage < 0.99
    assert len(graph.pruned()) < len(graph)
    assert "largest violation" in repr(graph)


def test_nodes_are_what_the_model_has(graph, gemma2, prompt):
    context = prompt.shape[1]
    counts = np.bincount(graph.kind, minlength=4)
    assert counts[ERROR] == 3 * context
    assert counts[TOKEN] == context
    assert graph.index[graph.kind == TOKEN].tolist() == prompt[0].tolist()
    assert (graph.position[graph.kind == LATENT] > 0).all()  # none at BOS
    assert (graph.activation[graph.kind == LATENT] > 0).all()
    with torch.no_grad():
        chances = gemma2(input_ids=prompt, use_cache=False).logits[0, -1].softmax(-1)
    targets = graph.index[graph.kind == LOGIT]
    assert targets.tolist() == chances.topk(len(targets)).indices.tolist()
    np.testing.assert_allclose(graph.start[graph.kind == LOGIT], chances[targets.tolist()], rtol=1e-5)
    assert chances[targets.tolist()].sum() > 0.95 or len(targets) == 10
    assert graph.facts.logit_error < 1e-4


def test_selected_latents_are_influential_and_their_edges_those_of_the_whole_graph(graph, gemma2, prompt):
    """The most influential ones of the whole graph are all among a third of it."""
    some = attribute(gemma2, CODERS, prompt, config=AttributionConfig(max_latents=100, memory_gib=1e-6))
    whole = edges_by_name(graph)
    assert all(weight == pytest.approx(whole[edge], rel=1e-4, abs=1e-6) for edge, weight in edges_by_name(some).items())
    best = np.argsort(-np.where(graph.kind == LATENT, graph.influence, 0))[:20]
    known = names(graph)
    assert {known[place] for place in best} <= set(names(some))


def test_a_contrast_is_the_difference_of_its_tokens(gemma2, prompt):
    one, other = (edges_by_name(attribute(gemma2, CODERS, prompt, target=TargetTokens((token,)))) for token in (7, 9))
    both = attribute(gemma2, CODERS, prompt, target=Contrast(7, 9))
    (row,) = np.flatnonzero(both.kind == LOGIT)
    target = names(both)[row]
    for (source, into), weight in edges_by_name(both).items():
        if into == target:
            apart = one.get((source, into), 0.0) - other.get((source, (*into[:3], 9)), 0.0)
            assert weight == pytest.approx(apart, abs=1e-5)
    assert both.facts.targets[0].against == 9


def test_a_latent_as_target(graph, gemma2, prompt):
    place = np.flatnonzero((graph.kind == LATENT) & (graph.layer == 2))[4]
    target = Latent(2, int(graph.position[place]), int(graph.index[place]))
    found = attribute(gemma2, CODERS, prompt, target=target)
    assert (found.kind == LOGIT).sum() == 0
    assert found.start.sum() == 1
    assert (found.position <= target.position).all() or (found.kind[found.position > target.position] != LATENT).all()
    whole = edges_by_name(graph)
    assert all(weight == pytest.approx(whole[edge], rel=1e-4, abs=1e-6) for edge, weight in edges_by_name(found).items())
    with pytest.raises(ConfigError, match="is not active at position 0"):
        attribute(gemma2, CODERS, prompt, target=Latent(2, 0, target.latent))


def test_where_transcoders_are_the_mlps_all_influence_comes_from_tokens(llama, prompt):
    coders = [relu_transcoder(layer, 32, 40) for layer in range(3)]
    for layer, coder in enumerate(coders):
        llama.model.layers[layer].mlp = ReluMlp(coder)
    without_bos = prompt[:, 1:]
    assert BOS not in without_bos
    graph = attribute(llama, coders, without_bos)
    assert graph.facts.replacement == pytest.approx(1, abs=1e-5)
    assert graph.facts.completeness == pytest.approx(1, abs=1e-5)
    with_bos = attribute(llama, coders, prompt)  # whose MLPs are errors
    assert with_bos.facts.replacement < 0.999


def test_layers_without_transcoder_are_errors(gemma2, prompt):
    graph = attribute(gemma2, CODERS[1:2], prompt)
    assert set(graph.layer[graph.kind == LATENT]) == {1}
    assert graph.coder[(graph.kind == ERROR) & (graph.layer == 0)].max() == -1
    assert gap(graph) < 1e-4


@pytest.mark.parametrize(
    ("coders", "target", "words"),
    [
        ([], None, "no transcoders given"),
        ([CODERS[0], CODERS[0]], None, "two coders at transcoder layer 0"),
        (CODERS, TargetTokens((70,)), "tokens 0 to 63"),
        (CODERS, TargetTokens((5, 5)), "each once"),
        (CODERS, Contrast(5, 5), "with itself"),
        (CODERS, Contrast(" a", " b"), "no tokenizer"),
    ],
)
def test_what_cannot_be_attributed_is_one_line(gemma2, prompt, coders, target, words):
    with pytest.raises(ConfigError, match=words):
        attribute(gemma2, coders, prompt, target=target)


def test_a_number_format_too_coarse_for_sums_is_refused(gemma2, prompt):
    with pytest.raises(ConfigError, match="in bfloat16, too coarse"):
        attribute(copy.deepcopy(gemma2).bfloat16(), CODERS, prompt)
