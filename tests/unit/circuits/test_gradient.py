"""The approximation through SAEs: its edges are slopes, cut at the sites between, and it is called what it is."""

import copy

import numpy as np
import pytest
import torch
from random_transcoders import transcoder

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import attribute, counted_tokens
from everyscope.circuits.config import TargetTokens
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.gradient import GradientTracer
from everyscope.circuits.graph import LATENT, LOGIT
from everyscope.circuits.intervene import intervene
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capturing
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import splice


def sae(layer: int) -> Sae:
    tensors = transcoder(layer, 32, 48).own_tensors()
    return Sae(**tensors, metadata=SaeMetadata(site=Site("resid_post", layer)))


SAES = [sae(layer) for layer in range(3)]


def test_edges_are_slopes_of_the_model_between_sites(model, prompt):
    """Central differences, in steps that float32 norms allow, of the next SAE's latents and of a logit behind the last."""
    model = copy.deepcopy(model).double()
    tracer = GradientTracer(
        FrozenModel(model, adapter_of(model), prompt), dict(enumerate(SAES)), counted_tokens(model, prompt[0])
    )
    assert torch.equal(tracer.frozen.capped(tracer.logits), tracer.frozen.logits)
    direction = tracer.direction(tracer.frozen.unembedding[7] - tracer.frozen.unembedding.mean(0))
    target = tracer.starts[1] + 9
    rows = tracer.rows(torch.tensor([target]), [direction])
    every = torch.ones(prompt.shape, dtype=torch.bool)

    def slope(layer: int, place: int) -> tuple[float, float]:
        found = tracer.layers[layer]
        more = torch.zeros(1, prompt.shape[1], 32, dtype=torch.float64)
        more[0, found.position[place]] = found.activation[place] * tracer.coders[layer].W_dec[found.latent[place]]
        values = []
        for sign in (1e-2, -1e-2):
            edit = {f"resid_post.{layer}": lambda x, sign=sign: x + sign * more}
            with splice(model, edit, every), torch.no_grad(), capturing(model, ["resid_post.1"]) as seen:
                logits = model(input_ids=prompt, use_cache=False).logits[0, -1]
            at, cap = tracer.layers[1], getattr(model.config, "final_logit_softcapping", None)
            raw = logits if cap is None else cap * torch.atanh(logits / cap)
            read = seen["resid_post.1"][0, at.position[9]]
            values.append((read @ tracer.coders[1].W_enc[:, at.latent[9]], raw[7] - raw.mean()))
        return tuple((one - other).item() / 2e-2 for one, other in zip(*values, strict=True))

    early, late = 5, 11
    assert rows.weight[0, tracer.starts[0] + early].item() == pytest.approx(slope(0, early)[0], rel=2e-3, abs=1e-5)
    assert rows.weight[1, tracer.starts[2] + late].item() == pytest.approx(slope(2, late)[1], rel=2e-3, abs=1e-5)
    assert not rows.weight[0, tracer.starts[1] : tracer.num_latents].any()
    assert not rows.weight[1, : tracer.starts[2]].any()  # the last SAE stands between
    assert not rows.weight[1, -prompt.shape[1] :].any()


def test_suites_without_transcoders_get_a_graph_that_says_what_it_is(gemma2, prompt):
    graph = attribute(gemma2, SAES, prompt, target=TargetTokens((7, 9)))
    assert graph.facts.method == "gradient"
    assert "approximate" in repr(graph)
    latents = graph.kind == LATENT
    assert set(graph.layer[latents]) == {0, 1, 2}
    targets = graph.edges.where(graph.kind[graph.edges.target] == LOGIT)
    assert set(graph.layer[targets.source]) == {2}
    gap = np.bincount(graph.edges.target, graph.edges.weight, len(graph)) + graph.rest - graph.pre
    assert np.abs(gap).max() > 1e-3  # no identity
    assert len(graph.pruned()) < len(graph)
    with pytest.raises(ConfigError, match="give its own model"):
        intervene(gemma2, SAES, graph, [[]])


@pytest.mark.parametrize(
    ("coders", "words"),
    [
        ([SAES[0], transcoder(1, 32, 48)], "transcoders and SAEs together"),
        ([Sae(**transcoder(0, 32, 48).own_tensors())], "does not say where it sits"),
        ([Sae(**transcoder(0, 32, 48).own_tensors(), metadata=SaeMetadata(site=Site("mlp_out", 0)))], "resid_post"),
    ],
)
def test_other_coders_are_refused(gemma2, prompt, coders, words):
    with pytest.raises(ConfigError, match=words):
        attribute(gemma2, coders, prompt)
