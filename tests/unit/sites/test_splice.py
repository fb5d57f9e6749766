from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from everyscope.base.errors import ConfigError, ModelError, ShapeMismatch
from everyscope.sites.capture import capture, capturing
from everyscope.sites.names import SUBLAYERS, Site, sites_of
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import resuming, special_ids, splice

KINDS = ("embed", *SUBLAYERS)


@pytest.mark.parametrize("kind", KINDS)
def test_splicing_the_identity_changes_no_bit_and_zeros_change_the_logits(model, input_ids, run, kind):
    clean = run(model, input_ids)
    for site in sites_of((kind,), None, adapter_of(model).num_layers):
        with splice(model, {site: lambda x: x.clone()}):
            assert torch.equal(run(model, input_ids), clean)
        with splice(model, {site: torch.zeros_like}):
            assert not torch.allclose(run(model, input_ids), clean, rtol=1e-3)


def test_splicing_the_identity_everywhere_at_once_changes_no_bit(model, input_ids, run):
    sites = sites_of(KINDS, None, adapter_of(model).num_layers)
    with splice(model, dict.fromkeys(sites, torch.clone)):
        spliced = run(model, input_ids)
    assert torch.equal(spliced, run(model, input_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_special_positions_pass_untouched(model, input_ids, run, kind):
    site = Site(kind, 0)
    special = torch.isin(input_ids, torch.tensor([0, 1, 2]))
    clean = capture(model, [site], input_ids)[site]
    with splice(model, {site: lambda x: torch.full_like(x, torch.nan)}), capturing(model, [site]) as found:
        run(model, input_ids)
    assert torch.equal(found[site][special], clean[special])
    assert found[site][~special].isnan().all()


def test_a_given_mask_decides_alone(gemma2, input_ids, run):
    site = Site("resid_post", 1)
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    mask[0, 0] = True  # BOS: whoever gives a mask may want that
    clean = capture(gemma2, [site], input_ids)[site]
    with splice(gemma2, {site: torch.zeros_like}, mask), capturing(gemma2, [site]) as found:
        run(gemma2, input_ids)
    assert torch.equal(found[site], clean * ~mask[..., None])


def test_the_mask_follows_the_input_of_each_pass(gemma2, input_ids, run):
    site = Site("resid_post", 0)
    with splice(gemma2, {site: torch.zeros_like}), capturing(gemma2, [site]) as found:
        for ids in (input_ids, input_ids.flip(0), input_ids[:, 3:]):
            run(gemma2, ids)
            assert torch.equal(found[site].abs().sum(-1) == 0, ids > 2)


def test_special_ids_may_be_lists_or_absent(gemma2, monkeypatch):
    monkeypatch.setattr(gemma2.config, "eos_token_id", [1, 9])
    monkeypatch.setattr(gemma2.config, "pad_token_id", None)
    assert special_ids(gemma2) == (1, 2, 9)


def test_splices_nest_and_end(gemma2, input_ids, run):
    clean = run(gemma2, input_ids)
    first, second = {Site("attn_out", 0): torch.zeros_like}, {Site("mlp_out", 2): torch.zeros_like}
    with splice(gemma2, first), splice(gemma2, second):
        nested = run(gemma2, input_ids)
    with splice(gemma2, first | second):
        assert torch.equal(run(gemma2, input_ids), nested)
    assert torch.equal(run(gemma2, input_ids), clean)


def test_gradients_flow_through_a_splice(gemma2, input_ids):
    gain = torch.ones((), requires_grad=True)
    with splice(gemma2, {Site("resid_post", 0): lambda x: x * gain}):
        gemma2(input_ids=input_ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert gain.grad is not None
    assert gain.grad.abs() > 0


def test_wrong_shapes_layers_and_inputs_are_refused_and_undone(gemma2, input_ids, run):
    clean = run(gemma2, input_ids)
    site = Site("mlp_out", 1)
    with pytest.raises(ShapeMismatch, match="mlp_out layer 1: the edit"), splice(gemma2, {site: lambda x: x[..., 1:]}):
        run(gemma2, input_ids)
    with (
        pytest.raises(ShapeMismatch, match="mask has shape"),
        splice(gemma2, {site: torch.clone}, torch.ones(1, 3, dtype=torch.bool)),
    ):
        run(gemma2, input_ids)
    with pytest.raises(ConfigError, match="layer 7"), splice(gemma2, {Site("resid_post", 7): torch.clone}):
        run(gemma2, input_ids)
    with pytest.raises(ModelError, match="input_ids"), splice(gemma2, {site: torch.clone}):
        gemma2(inputs_embeds=torch.zeros(1, 4, 32), use_cache=False)
    with splice(gemma2, {site: torch.clone}):
        with pytest.raises(IndexError):
            run(gemma2, input_ids + 1000)
        with pytest.raises(ModelError, match="only a part"):
            gemma2.model(input_ids=input_ids)
    assert torch.equal(run(gemma2, input_ids), clean)


def test_an_error_in_an_edit_leaves_no_trace(model, input_ids, run):
    clean = run(model, input_ids)

    def fail(x):
        raise ZeroDivisionError

    sites = sites_of(KINDS, None, adapter_of(model).num_layers)
    with pytest.raises(ZeroDivisionError), splice(model, dict.fromkeys(sites, fail)):
        run(model, input_ids)
    assert torch.equal(run(model, input_ids), clean)


def test_resuming_gives_the_same_bits_and_skips_the_layers_below(model, input_ids, run):
    adapter = adapter_of(model)
    clean = run(model, input_ids)
    with resuming(model, -1, torch.zeros(1, 1, adapter.d_model)):
        assert torch.equal(run(model, input_ids), clean)
    for layer in range(adapter.num_layers):
        site = Site("resid_post", layer)
        resid = capture(model, [site], input_ids)[site]
        with resuming(model, layer, resid), capturing(model, sites_of(SUBLAYERS, None, adapter.num_layers)) as found:
            assert torch.equal(run(model, input_ids), clean)
        assert {seen.layer for seen in found if seen.kind == "mlp_out"} == set(range(layer + 1, adapter.num_layers))


def test_splicing_above_or_at_the_resumed_layer_is_splicing_a_full_pass(model, input_ids, run):
    resid = capture(model, [Site("resid_post", 1)], input_ids)[Site("resid_post", 1)]
    for site in (Site("resid_post", 1), *(Site(kind, 2) for kind in SUBLAYERS)):
        with splice(model, {site: lambda x: x * 0.5}):
            full = run(model, input_ids)
            with resuming(model, 1, resid):
                assert torch.equal(run(model, input_ids), full)


def test_resuming_refuses_what_does_not_fit_and_restores_forward(gemma2, input_ids, run):
    resid = capture(gemma2, [Site("resid_post", 1)], input_ids)[Site("resid_post", 1)]
    with pytest.raises(ShapeMismatch, match="this pass works on"), resuming(gemma2, 1, resid):
        run(gemma2, input_ids[:, :4])
    with pytest.raises(ShapeMismatch, match="width 16"), resuming(gemma2, 1, resid[..., :16]):
        run(gemma2, input_ids)
    with pytest.raises(ConfigError, match="layer 3"), resuming(gemma2, 3, resid):
        run(gemma2, input_ids)
    with pytest.raises(ConfigError, match="layer -2"), resuming(gemma2, -2, resid):
        run(gemma2, input_ids)


def test_resuming_puts_back_a_forward_that_was_there_before(gemma2, input_ids, run):
    block = gemma2.model.layers[0]
    resid = capture(gemma2, [Site("resid_post", 0)], input_ids)[Site("resid_post", 0)]
    wrapped = block.forward
    block.forward = wrapped  # as accelerate does
    try:
        with resuming(gemma2, 0, resid):
            run(gemma2, input_ids)
        assert vars(block)["forward"] is wrapped
    finally:
        del block.forward


class Halves(torch.nn.Module):
    """An autoencoder with an error of its own: it forgets the second half of the coordinates, and its latents are the first."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain))

    def encode(self, x):
        return self.gain * x[..., : x.shape[-1] // 2]

    def decode(self, f):
        return torch.cat([f, torch.zeros_like(f)], -1)

    def forward(self, x):
        return self.decode(self.encode(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_error_kept_a_pass_without_edits_changes_no_bit(gemma2, input_ids, run, dtype):
    model = deepcopy(gemma2).to(dtype)
    clean = run(model, input_ids)
    edits = dict.fromkeys(sites_of(SUBLAYERS, None, 3), Halves())
    with splice(model, edits, keep_error=True) as spliced:
        assert torch.equal(run(model, input_ids), clean)
    assert set(spliced.latents) == set(edits)
    with splice(model, edits):
        assert not torch.equal(run(model, input_ids), clean)


def test_latents_come_back_and_can_be_edited(gemma2, input_ids, run):
    site, sae = Site("resid_post", 1), Halves()
    x = capture(gemma2, site, input_ids)
    everywhere = torch.ones_like(input_ids, dtype=torch.bool)

    def push(f):
        return f + 3 * (torch.arange(f.shape[-1]) == 5)

    with splice(gemma2, {"resid_post.1": sae}, everywhere) as spliced:
        plain = run(gemma2, input_ids)
        assert torch.equal(spliced.latents["resid_post.1"], sae.encode(x))
    with splice(gemma2, {site: sae}, everywhere, edit_latents=push) as spliced, capturing(gemma2, site) as found:
        run(gemma2, input_ids)
    assert torch.equal(spliced.latents[site], push(sae.encode(x)))
    assert torch.equal(found[site], sae.decode(push(sae.encode(x))))
    with (
        splice(gemma2, {site: sae}, everywhere, edit_latents={"resid_post.1": push}, keep_error=True),
        capturing(gemma2, site) as found,
    ):
        run(gemma2, input_ids)
    change = torch.zeros(32)
    change[5] = 3
    torch.testing.assert_close(found[site], x + change, rtol=1e-5, atol=1e-5)
    with splice(gemma2, {site: sae.forward}, everywhere):  # a function, whose latents nobody sees, replaces the same
        assert torch.equal(run(gemma2, input_ids), plain)


def test_gradients_reach_latents_and_see_the_error_as_a_constant(gemma2, input_ids):
    sae = Halves(0.5)
    with splice(gemma2, {"resid_post.0": sae}, keep_error=True) as spliced:
        loss = gemma2(input_ids=input_ids, use_cache=False).logits.logsumexp(-1).sum()
        latents = spliced.latents["resid_post.0"]
        by_latents, by_gain = torch.autograd.grad(loss, [latents, sae.gain])
    assert (by_latents != 0).any()
    # The forward pass does not depend on the gain, for the error makes up for it; its gradient is that of the latents alone.
    torch.testing.assert_close(by_gain, (by_latents * latents / 0.5).sum(), rtol=1e-4, atol=1e-4)


def test_an_edit_that_knows_its_site_stands_alone(gemma2, input_ids, run):
    sae = Halves()
    sae.metadata = SimpleNamespace(site=Site("mlp_out", 2))
    with splice(gemma2, {Site("mlp_out", 2): sae}):
        want = run(gemma2, input_ids)
    with splice(gemma2, sae):
        assert torch.equal(run(gemma2, input_ids), want)
    with pytest.raises(ConfigError, match="does not say at which site"), splice(gemma2, torch.clone):
        pass


def test_options_that_nothing_follows_are_refused(gemma2):
    site = Site("resid_post", 1)
    for options, complaint in (
        ({"keep_error": True}, "keep_error needs an SAE"),
        ({"edit_latents": torch.clone}, "edit_latents needs an SAE"),
        ({"edit_latents": {"mlp_out.1": torch.clone}}, "mlp_out layer 1, where nothing is spliced"),
    ):
        with pytest.raises(ConfigError, match=complaint), splice(gemma2, {site: torch.clone}, **options):
            pass
    with pytest.raises(ConfigError, match="named twice"), splice(gemma2, {site: torch.clone, "model.layers.1": torch.clone}):
        pass
    with pytest.raises(ConfigError, match="no function"), splice(gemma2, {site: 3}):
        pass


def test_edited_latents_of_another_shape_are_refused(gemma2, input_ids, run):
    with (
        pytest.raises(ShapeMismatch, match="edit_latents"),
        splice(gemma2, {"resid_post.1": Halves()}, edit_latents=lambda f: f[..., 1:]),
    ):
        run(gemma2, input_ids)
