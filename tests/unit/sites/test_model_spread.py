"""A model spread over devices gives the same bits at every site. Without a GPU, the parts are memory and disk."""

import sys
from importlib.util import find_spec

import pytest
import torch

import everyscope.sites.model as loading
from everyscope.base.errors import MissingExtra, ModelError
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.model import load_language_model
from everyscope.sites.names import SUBLAYERS, Site
from everyscope.sites.splice import resuming, splice

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def plain():
    return load_language_model(ModelConfig(name="tiny"))


@pytest.fixture
def spread(tmp_path, monkeypatch):
    """The bundled model, three of its blocks on disk until they are called."""
    monkeypatch.setattr(loading, "spreading", lambda config: {"device_map": SPREAD, "offload_folder": str(tmp_path)})
    return load_language_model(ModelConfig(name="tiny", device_map="auto"))


@pytest.fixture
def ids():
    return torch.randint(3, 500, (3, 24), generator=torch.Generator().manual_seed(5))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@needs_accelerate
def test_blocks_are_where_the_map_says(spread):
    assert [next(block.parameters()).is_meta for block in spread.adapter.blocks] == [True, False, True, True]
    assert not any(parameter.requires_grad for parameter in spread.model.parameters())


@needs_accelerate
def test_every_site_has_the_same_bits(plain, spread, ids):
    sites = [Site("embed", 0), *(Site(kind, layer) for layer in range(plain.adapter.num_layers) for kind in SUBLAYERS)]
    whole, parts = capture(plain.model, sites, ids), capture(spread.model, sites, ids)
    assert all(torch.equal(whole[site], parts[site]) for site in sites)
    assert {site: spread.adapter.width(site) for site in sites} == {site: plain.adapter.width(site) for site in sites}


@needs_accelerate
def test_the_gate_gives_the_same_error(plain, spread):
    assert check_residual_identity(spread.model) == check_residual_identity(plain.model) < 1e-5


@needs_accelerate
@pytest.mark.parametrize("kind", SUBLAYERS)
def test_a_spliced_pass_has_the_same_bits(plain, spread, ids, kind):
    found = []
    for model in (plain.model, spread.model):
        before = logits(model, ids)
        with splice(model, {Site(kind, 2): lambda x: 0.5 * x, Site(kind, 3): torch.zeros_like}):
            found.append(logits(model, ids))
        assert torch.equal(logits(model, ids), before)
        assert not torch.equal(found[-1], before)
    assert torch.equal(*found)


@needs_accelerate
def test_a_pass_resumed_above_blocks_on_disk_has_the_same_bits(plain, spread, ids):
    resid = capture(plain.model, [Site("resid_post", 2)], ids)[Site("resid_post", 2)]
    with resuming(spread.model, 2, resid):
        assert torch.equal(logits(spread.model, ids), logits(plain.model, ids))
    assert torch.equal(logits(spread.model, ids), logits(plain.model, ids))


@needs_accelerate
def test_accelerates_own_map_gives_the_same_bits(plain, ids):
    ours = load_language_model(ModelConfig(name="tiny", device_map="auto"))
    assert torch.equal(logits(ours.model, ids).cpu(), logits(plain.model, ids))


@needs_accelerate
def test_a_model_whose_embeddings_fit_nowhere_is_refused(tmp_path, monkeypatch):
    nowhere = SPREAD | {"model.embed_tokens": "disk", "lm_head": "disk"}
    monkeypatch.setattr(loading, "spreading", lambda config: {"device_map": nowhere, "offload_folder": str(tmp_path)})
    with pytest.raises(ModelError, match="not even its embeddings"):
        load_language_model(ModelConfig(name="tiny", device_map="auto"))


def test_without_accelerate_the_command_that_mends_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"device_map=balanced needs .*pip install 'everyscope\[large\]'"):
        load_language_model(ModelConfig(name="tiny", device_map="balanced"))


def test_a_device_map_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="drawn as a whole"):
        ModelConfig(device_map="auto", weights="random")
    with pytest.raises(ValueError, match="device_map"):
        ModelConfig(device_map="abacus")  # pyright: ignore


def test_a_model_on_one_device_has_the_record_that_it_always_had():
    assert ModelConfig().as_json() == {"name": "tiny", "revision": None, "dtype": "float32", "device": "cpu"}
    assert ModelConfig(device_map="auto").as_json()["device_map"] == "auto"
    assert ModelConfig.model_validate(ModelConfig(device_map="auto").as_json()).device_map == "auto"
