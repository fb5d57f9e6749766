from copy import deepcopy

import pytest
import torch

from everyscope.base.errors import ConfigError
from everyscope.sites.capture import capture, capturing
from everyscope.sites.names import SUBLAYERS, Site, sites_of
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import splice


def test_the_residual_stream_is_what_the_model_itself_reports(model, input_ids):
    with torch.no_grad():
        # A copy, for transformers leaves hooks of its own behind when it reports hidden states.
        reported = deepcopy(model)(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
    last = adapter_of(model).num_layers - 1
    found = capture(model, [Site("embed", 0), *(Site("resid_post", layer) for layer in range(last))], input_ids)
    for site, x in found.items():
        # The model's own list ends behind the final norm, so the last layer is not compared.
        assert torch.equal(x, reported[0 if site.kind == "embed" else site.layer + 1])


def test_sites_captured_together_or_one_by_one_are_the_same(model, input_ids):
    sites = sites_of(("embed", *SUBLAYERS), None, adapter_of(model).num_layers)
    together = capture(model, sites, input_ids)
    assert tuple(together) == sites
    for site in sites:
        assert torch.equal(capture(model, [site], input_ids)[site], together[site])


def test_capture_stops_behind_the_last_wanted_site(model, input_ids):
    adapter = adapter_of(model)
    ran = set()
    handles = [
        block.register_forward_pre_hook(lambda module, args, layer=layer: ran.add(layer))
        for layer, block in enumerate(adapter.blocks)
    ]
    capture(model, [Site("resid_post", 1), Site("mlp_out", 0)], input_ids)
    for handle in handles:
        handle.remove()
    assert ran == {0, 1}


def test_capturing_gives_activations_beside_unchanged_logits(model, input_ids, run):
    sites = sites_of(SUBLAYERS, None, adapter_of(model).num_layers)
    clean = run(model, input_ids)
    with capturing(model, sites) as found:
        assert torch.equal(run(model, input_ids), clean)
        run(model, input_ids[:1])
        assert all(found[site].shape[0] == 1 for site in sites), "every pass fills the dict anew"
        run(model, input_ids)
    captured = capture(model, sites, input_ids)
    assert all(torch.equal(found[site], captured[site]) for site in sites)
    assert set(found) == set(sites)


def test_padded_positions_do_not_change_the_others(gemma2, input_ids):
    site = Site("resid_post", 2)
    mask = torch.ones_like(input_ids)
    mask[1, -3:] = 0
    padded = capture(gemma2, [site], input_ids, mask)[site]
    short = capture(gemma2, [site], input_ids[1:, :-3])[site]
    torch.testing.assert_close(padded[1:, :-3], short)


def test_capturing_inside_a_splice_sees_what_was_spliced_and_outside_what_was_there(gemma2, input_ids, run):
    site = Site("mlp_out", 1)
    clean = capture(gemma2, [site], input_ids)[site]
    everywhere = torch.ones_like(input_ids, dtype=torch.bool)
    with capturing(gemma2, [site]) as outside, splice(gemma2, {site: torch.zeros_like}, everywhere):  # noqa: SIM117
        with capturing(gemma2, [site]) as inside:
            run(gemma2, input_ids)
    assert torch.equal(outside[site], clean)
    assert torch.equal(inside[site], torch.zeros_like(clean))


def test_no_sites_and_layers_out_of_range_are_refused(gemma2, input_ids):
    with pytest.raises(ConfigError, match="no sites"):
        capture(gemma2, [], input_ids)
    with pytest.raises(ConfigError, match="layer 3"):
        capture(gemma2, [Site("attn_out", 0), Site("attn_out", 3)], input_ids)


def test_hooks_are_gone_after_the_model_failed(model, input_ids):
    with pytest.raises(IndexError):
        capture(model, [Site("resid_post", 0)], input_ids + 1000)  # the fixture checks for hooks left behind


def test_one_site_gives_its_activations_and_names_are_sites(gemma2, input_ids):
    site = Site("resid_post", 1)
    want = capture(gemma2, [site], input_ids)[site]
    assert torch.equal(capture(gemma2, site, input_ids), want)
    assert torch.equal(capture(gemma2, "blocks.1.hook_resid_post", input_ids), want)
    several = capture(gemma2, ["model.layers.1", "mlp_out.0"], input_ids)
    assert list(several) == [site, Site("mlp_out", 0)]
    assert torch.equal(several["resid_post.1"], want)
    with capturing(gemma2, "resid_post.1") as found:
        gemma2(input_ids=input_ids, use_cache=False)
    assert torch.equal(found["resid_post.1"], want)
    with pytest.raises(ConfigError, match="did you mean"):
        capture(gemma2, "resid_pots.1", input_ids)
    with pytest.raises(ConfigError, match="load_language_model"):
        capture("gpt2", "resid_post.1", input_ids)  # pyright: ignore[reportCallIssue, reportArgumentType]
