"""What MLPs read and what they make of it, in every family: places, widths, the gate, and the norm between."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.capture import capture
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.names import Site, places_of, site_of
from everyscope.sites.norms import mlp_norm_of
from everyscope.sites.registry import FAMILIES, adapter_of, inspect_blocks

LAYER = 1
WITHOUT_NORM = ("olmo2",)


@torch.no_grad()
def test_the_mlp_makes_mlp_out_of_mlp_in(model, family, input_ids):
    adapter = adapter_of(model)
    found = capture(model, [f"{kind}.{LAYER}" for kind in ("resid_mid", "mlp_in", "mlp_out")], input_ids)
    block: Any = adapter.block(LAYER)
    made = block.mlp(found["mlp_in.1"])
    if family in ("gemma2", "gemma3_text", "olmo2"):
        made = block.post_feedforward_layernorm(made)
    torch.testing.assert_close(made, found["mlp_out.1"], rtol=1e-6, atol=1e-6)
    assert adapter.width(Site("mlp_in", LAYER)) == adapter.width(Site("transcoder", LAYER)) == found["mlp_in.1"].shape[-1]


@torch.no_grad()
def test_resid_mid_is_the_stream_that_the_norm_reads(model, family, input_ids):
    """Where blocks are sequential it is what attention leaves; in GPT-NeoX, attention and MLP read the same stream."""
    adapter = adapter_of(model)
    found = capture(model, [f"{kind}.{LAYER}" for kind in ("resid_post", "mlp_out", "resid_mid", "mlp_in")], input_ids)
    behind_attention = found["resid_post.1"] - found["mlp_out.1"]
    want = capture(model, "resid_post.0", input_ids) if family == "gpt_neox" else behind_attention
    torch.testing.assert_close(found["resid_mid.1"], want, rtol=1e-5, atol=1e-4)
    if family in WITHOUT_NORM:
        assert torch.equal(found["resid_mid.1"], found["mlp_in.1"])
        with pytest.raises(ModelError, match="without a norm"):
            mlp_norm_of(adapter, LAYER)
        return
    norm = mlp_norm_of(adapter, LAYER)
    x = found["resid_mid.1"].double()
    is_centring = family in ("gpt2", "gpt_neox")
    x = x - x.mean(-1, keepdim=True) if is_centring else x
    normalised = x / x.square().mean(-1, keepdim=True).sqrt()  # but for an epsilon of 1e-6 or 1e-5
    torch.testing.assert_close(normalised * norm.gain + norm.bias, found["mlp_in.1"].double(), rtol=1e-4, atol=1e-4)
    assert bool(norm.bias.any()) == is_centring


def test_the_norms_gain_is_exact(model, family):
    adapter = adapter_of(model)
    norm: Any = adapter.mlp_norm(LAYER)
    if norm is None:
        return
    want = 1 + norm.weight if family.startswith("gemma") else norm.weight
    torch.testing.assert_close(mlp_norm_of(adapter, LAYER).gain, want, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"mlp": "mlp.up_proj"}, "does not make mlp_out of mlp_in"),
        (
            {"mlp": "post_feedforward_layernorm"},
            "does not make mlp_in of resid_mid",
        ),  # a place where mlp_out follows, and the norm not
        ({"mlp_norm": "post_attention_layernorm"}, "the norm before its MLP does not make mlp_in"),
        ({"mlp_norm": "input_layernorm"}, "the norm before its MLP does not make mlp_in"),
        ({"mlp_norm": None, "mlp": "self_attn.o_proj"}, "does not make mlp_out of mlp_in"),
    ],
)
def test_a_wrong_place_for_what_the_mlp_reads_is_refused(gemma2, change, complaint):
    wrong = inspect_blocks(gemma2, replace(FAMILIES["gemma2"], **change))
    with pytest.raises(ModelError, match=complaint):
        check_residual_identity(gemma2, adapter=wrong)


def test_a_transcoders_site_is_two_places(gemma2):
    site = Site.parse("transcoder.1")
    assert site == Site.parse("transcoder/layer_1") == Site("transcoder", 1)
    assert (site.inputs, site.outputs) == ((Site("mlp_in", 1),), (Site("mlp_out", 1),))
    assert places_of([Site("mlp_out", 1), site, Site("embed", 0)]) == (Site("mlp_out", 1), Site("mlp_in", 1), Site("embed", 0))
    assert Site("resid_post", 1).inputs == Site("resid_post", 1).outputs == (Site("resid_post", 1),)
    input_ids = torch.ones(1, 3, dtype=torch.int64)
    assert torch.equal(capture(gemma2, site, input_ids), capture(gemma2, "mlp_in.1", input_ids)), "what a transcoder there reads"
    with pytest.raises(ConfigError, match="layer 3"):
        adapter_of(gemma2).width(Site("transcoder", 3))


def test_where_a_coder_sits_follows_from_what_it_reads_and_writes():
    for kind in ("transcoder", "resid_transcoder", "mlp_out"):
        site = Site(kind, 2)
        assert site_of(site.inputs[0], site.outputs[0]) == site == Site.parse(f"{kind}.2")
        assert site.is_transcoder == (kind != "mlp_out")
    assert site_of(Site("mlp_in", 2), Site("mlp_out", 2)) == Site("transcoder", 2)
    assert site_of(Site("resid_mid", 2), Site("mlp_out", 2)) == Site("resid_transcoder", 2)
    assert site_of(Site("mlp_in", 2), Site("mlp_out", 3)) is None
    assert site_of(Site("embed", 0), Site("embed", 0)) == Site("embed", 0)


def test_transformerlens_names_of_the_mlps_places():
    assert Site.parse("blocks.4.mlp.hook_in") == Site("mlp_in", 4)
    assert Site.parse("blocks.4.hook_resid_mid") == Site("resid_mid", 4)
    assert Site("transcoder", 4).hook_name == Site("mlp_in", 4).hook_name == "blocks.4.mlp.hook_in"
