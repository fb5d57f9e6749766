"""The approximation through SAEs: its edges are slopes, cut at the sites between, and it is called what it is."""

import copy

import numpy as np
import pytest
import torch
from random_transcoders import transcoder
from torch import Tensor

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import attribute, counted_tokens
from everyscope.circuits.circuit_tracer import from_json, to_json
from everyscope.circuits.config import Latent, TargetTokens
from everyscope.circuits.files import read_graph
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.gradient import GradientTracer
from everyscope.circuits.graph import LATENT, LOGIT
from everyscope.circuits.intervene import intervene
from everyscope.circuits.writing import write_graph
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capturing
from everyscope.sites.names import SUBLAYERS, Site
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import splice

SITES = [Site(kind, layer) for layer in range(3) for kind in SUBLAYERS]


def sae(site: Site, width: int = 32) -> Sae:
    tensors = transcoder(10 * site.layer + SUBLAYERS.index(site.kind), width, 48).own_tensors()
    return Sae(**tensors, metadata=SaeMetadata(site=site))


def saes_of(model) -> dict[Site, Sae]:
    return {site: sae(site, adapter_of(model).width(site)) for site in SITES}


LOGITS = "logits"


@pytest.fixture
def tracer(model, prompt) -> GradientTracer:
    model = copy.deepcopy(model).double()
    frozen = FrozenModel(model, adapter_of(model), prompt)
    return GradientTracer(frozen, saes_of(model), counted_tokens(model, prompt[0]))


def value(tracer: GradientTracer, target: str, node: int, held: dict[str, Tensor]) -> Tensor:
    """Of a latent before its threshold, or of a logit less the mean, with the activations at some sites replaced."""
    model, every = tracer.frozen.model, torch.ones(tracer.frozen.input_ids.shape, dtype=torch.bool)
    with splice(model, {site: lambda x, to=to: to for site, to in held.items()}, every), torch.no_grad():
        if target == LOGITS:
            logits = model(input_ids=tracer.frozen.input_ids, use_cache=False).logits[0, -1]
            cap = getattr(model.config, "final_logit_softcapping", None)
            raw = logits if cap is None else cap * torch.atanh(logits / cap)
            return raw[node] - raw.mean()
        with capturing(model, [target]) as seen:
            model(input_ids=tracer.frozen.input_ids, use_cache=False)
    place = tracer.sites.index(Site.parse(target))
    at, coder = tracer.layers[place], tracer.coders[tracer.sites[place]]
    return seen[target][0, at.position[node]] @ coder.W_enc[:, at.latent[node]]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("embed", "attn_out.0"),
        ("embed", "resid_post.0"),
        ("resid_post.0", "attn_out.1"),
        ("resid_post.0", "mlp_out.1"),
        ("resid_post.0", "resid_post.1"),
        ("attn_out.1", "mlp_out.1"),
        ("attn_out.1", "resid_post.1"),
        ("mlp_out.1", "resid_post.1"),
        ("resid_post.2", LOGITS),
    ],
)
def test_edges_are_slopes_of_the_model_between_sites(tracer, source, target):
    """Central differences, in every family, with all sites between held as they are; of latents, errors and tokens."""
    names = [f"{site.kind}.{site.layer}" for site in tracer.sites]
    assert torch.equal(tracer.frozen.capped(tracer.logits), tracer.frozen.logits)
    with capturing(tracer.frozen.model, ["embed", *names]) as clean, torch.no_grad():
        tracer.frozen.model(input_ids=tracer.frozen.input_ids, use_cache=False)
    node = 7 if target == LOGITS else 9
    if target == LOGITS:
        rows = tracer.frozen.unembedding
        found = tracer.rows(torch.zeros(0, dtype=torch.int64), [tracer.direction(rows[node] - rows.mean(0))])
    else:
        found = tracer.rows(torch.tensor([tracer.starts[names.index(target)] + node]), [])
    begin = 0 if source == "embed" else names.index(source) + 1
    end = len(names) if target == LOGITS else names.index(target)
    held = {name: clean[name] for name in names[begin:end]}
    context, position = tracer.frozen.context, tracer.frozen.context - 1 if target == LOGITS else None
    wrote = torch.zeros_like(clean[source])
    if source == "embed":
        position = int(tracer.layers[end].position[node])
        sent = found.weight[0, tracer.num_sources - context + position]
        wrote[0, position] = tracer.frozen.embed[0, position]
    else:
        place = names.index(source)
        at, coder = tracer.layers[place], tracer.coders[tracer.sites[place]]
        position = int(tracer.layers[end].position[node]) if position is None else position
        one = int((at.position == position).nonzero()[3, 0])
        sent = found.weight[0, tracer.starts[place] + one]
        wrote[0, position] = at.activation[one] * coder.W_dec[at.latent[one]]
        errors = found.weight[0, tracer.num_latents + place * context :][:context]
        left = {"more": tracer.errors[place][None], "sent": errors.sum()}
        slope = _slope(tracer, target, node, held, source, clean, left["more"])
        assert left["sent"].item() == pytest.approx(slope, rel=2e-3, abs=1e-5)
    assert sent.item() == pytest.approx(_slope(tracer, target, node, held, source, clean, wrote), rel=2e-3, abs=1e-5)
    assert sent != 0 or "gpt_neox" in str(type(tracer.frozen.model)).lower()  # its MLP does not read attention's output


def _slope(tracer, target, node, held, source, clean, more) -> float:
    """In steps that float32 norms allow."""
    values = [value(tracer, target, node, {**held, source: clean[source] + step * more}) for step in (1e-2, -1e-2)]
    return (values[0] - values[1]).item() / 2e-2


def test_nothing_passes_a_site_with_an_sae(tracer):
    last = tracer.frozen.unembedding[7]
    rows = tracer.rows(torch.zeros(0, dtype=torch.int64), [tracer.direction(last)])
    assert tracer.sites[-1] == Site("resid_post", 2)
    assert not rows.weight[0, : tracer.starts[-2]].any()
    assert not rows.weight[0, -tracer.frozen.context :].any()


def test_suites_without_transcoders_get_a_graph_that_says_what_it_is(gemma2, prompt):
    graph = attribute(gemma2, list(saes_of(gemma2).values()), prompt, target=TargetTokens((7, 9)))
    assert graph.facts.method == "gradient"
    assert "approximate" in repr(graph)
    latents = graph.kind == LATENT
    assert [(coder.kind, coder.layer) for coder in graph.facts.coders] == [(site.kind, site.layer) for site in SITES]
    assert set(graph.coder[latents]) == set(range(len(SITES)))
    assert graph.is_stacked
    assert set(graph.row[latents]) == set(range(9))
    assert set(graph.row[graph.start > 0]) == {9}
    targets = graph.edges.where(graph.kind[graph.edges.target] == LOGIT)
    assert set(graph.level[targets.source]) == {8}
    into_stream = graph.edges.where(np.isin(graph.edges.target, np.flatnonzero(latents & (graph.level == 5))))
    assert set(graph.level[into_stream.source]) == {2, 3, 4}
    gap = np.bincount(graph.edges.target, graph.edges.weight, len(graph)) + graph.rest - graph.pre
    assert np.abs(gap).max() > 1e-3  # no identity
    assert len(graph.pruned()) < len(graph)
    with pytest.raises(ConfigError, match="give its own model"):
        intervene(gemma2, list(saes_of(gemma2).values()), graph, [[]])
    places = list(
        zip(graph.layer[latents].tolist(), graph.position[latents].tolist(), graph.index[latents].tolist(), strict=True)
    )
    twice = max(places, key=places.count)
    with pytest.raises(ConfigError, match="name its site"):
        attribute(gemma2, list(saes_of(gemma2).values()), prompt, target=Latent(*twice))
    coders = graph.coder[latents][[place == twice for place in places]]
    kinds = [graph.facts.coders[coder].kind for coder in coders]
    assert len(kinds) > 1
    ends = [attribute(gemma2, list(saes_of(gemma2).values()), prompt, target=Latent(*twice, kind)) for kind in kinds]
    assert [end.facts.coders[int(end.coder[end.start > 0][0])].kind for end in ends] == kinds


def test_files_keep_stacked_graphs_and_circuit_tracer_gets_a_layer_for_each_site(gemma2, prompt, tmp_path):
    graph = attribute(gemma2, list(saes_of(gemma2).values()), prompt, target=TargetTokens((7, 9))).pruned()
    write_graph(tmp_path / "graph", graph)
    read = read_graph(tmp_path / "graph")
    np.testing.assert_array_equal(read.level, graph.level)
    foreign = from_json(to_json(graph, "slug", {}, "scan"), "graph.json")
    assert foreign.facts.num_layers == 9
    order = np.argsort(graph.kind, kind="stable")
    np.testing.assert_array_equal(foreign.layer, graph.row[order])
    np.testing.assert_array_equal(foreign.index, graph.index[order])


@pytest.mark.parametrize(
    ("coders", "words"),
    [
        ([sae(SITES[0]), transcoder(1, 32, 48)], "transcoders and SAEs together"),
        ([Sae(**transcoder(0, 32, 48).own_tensors())], "does not say where it sits"),
        ([Sae(**transcoder(0, 32, 48).own_tensors(), metadata=SaeMetadata(site=Site("mlp_in", 0)))], "attn_out, mlp_out"),
        ([sae(Site("mlp_out", 0)), sae(Site("mlp_out", 0))], "two coders at mlp_out"),
        ([sae(Site("mlp_out", 7))], "of one model"),
        ([Sae(**transcoder(0, 24, 48).own_tensors(), metadata=SaeMetadata(site=Site("mlp_out", 0)))], "32 wide"),
    ],
)
def test_other_coders_are_refused(gemma2, prompt, coders, words):
    with pytest.raises(ConfigError, match=words):
        attribute(gemma2, coders, prompt)
