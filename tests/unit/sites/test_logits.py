"""Directions' logits against autograd through the model's own modules.

A norm's size does not move along a direction that is orthogonal to where it stands (after its centring). So at such a base the
derivative of the true modules is that of the linearised ones, divided by the size there.
"""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp

from everyscope.base.errors import ModelError, ShapeMismatch
from everyscope.sites.logits import final_norm, gain_of, logit_path
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of

SUBLAYERS = ("attn_out", "mlp_out", "resid_post")


def orthogonal_base(direction: Tensor, is_centring: bool, seed: int) -> Tensor:
    """A random vector of mean 0 (where the norm centres) that is orthogonal to the centred direction."""
    base = torch.randn(direction.shape, generator=torch.Generator().manual_seed(seed), dtype=direction.dtype) * 3
    if is_centring:
        base, direction = base - base.mean(), direction - direction.mean()
    return base - direction * (base @ direction) / (direction @ direction)


def size(x: Tensor, is_centring: bool) -> Tensor:
    return (x.var(correction=0) if is_centring else x.square().mean()).sqrt()


def through(norm: nn.Module, direction: Tensor, is_centring: bool, seed: int) -> Tensor:
    """The derivative of the true norm along the direction at an orthogonal base, times the size there."""
    base = orthogonal_base(direction, is_centring, seed)
    return jvp(lambda x: norm(x[None])[0], (base,), (direction,))[1] * size(base, is_centring)


@pytest.mark.parametrize("kind", SUBLAYERS)
def test_logits_are_those_of_the_linearised_model(model, family, kind):
    model = deepcopy(model).double()
    adapter, site = adapter_of(model), Site(kind, 2)
    path = logit_path(model, site)
    is_centring = family in ("gpt2", "gpt_neox")
    direction = torch.randn(adapter.width(site), generator=torch.Generator().manual_seed(3)).double()
    residual = direction
    if kind == "attn_out":
        projection = adapter.projected(2).module
        zero = torch.zeros_like(direction)
        residual = projection((direction)[None])[0] - projection(zero[None])[0]
        if family in ("gemma2", "gemma3_text", "olmo2"):
            residual = through(adapter.attention_added(2).module, residual, is_centring, seed=4)
    head = model.get_output_embeddings()
    want = head(through(final_norm(model, adapter), residual, is_centring, seed=5)[None])[0]
    got = (path.through_norms(direction[None]) @ path.unembedding.float().T)[0].double()
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))  # the norms' epsilon, and float32


def test_the_whole_models_logits_move_as_told(gemma2):
    """Through the whole model: at the last layer's output nothing but the final norm and the head is left."""
    model = deepcopy(gemma2).double()
    adapter = adapter_of(model)
    path = logit_path(model, Site("resid_post", 2))
    direction = torch.randn(adapter.d_model, generator=torch.Generator().manual_seed(1)).double()
    base = orthogonal_base(direction, False, seed=2)
    step = 3e-3  # transformers computes norms in float32, whatever the model is in

    def logits(x: Tensor) -> Tensor:
        hook = adapter.blocks[-1].register_forward_hook(
            lambda module, args, output: (
                (x.expand_as(output[0]), *output[1:]) if isinstance(output, tuple) else x.expand_as(output)
            )
        )
        try:
            return model(input_ids=torch.tensor([[2, 5]])).logits[0, 1]
        finally:
            hook.remove()

    cap = model.config.final_logit_softcapping
    uncapped = [cap * torch.atanh(logits(base + sign * step * direction) / cap) for sign in (1, -1)]
    want = (uncapped[0] - uncapped[1]) / (2 * step) * size(base, False)
    got = (path.through_norms(direction[None]) @ path.unembedding.float().T)[0].double()
    assert path.softcap == cap
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("kind", SUBLAYERS)
def test_raw_logits_know_no_norm(model, kind):
    adapter, site = adapter_of(model), Site(kind, 1)
    direction = torch.randn(2, adapter.width(site), generator=torch.Generator().manual_seed(3))
    residual = direction
    if kind == "attn_out":
        projection = adapter.projected(1).module
        residual = projection(direction) - projection(torch.zeros_like(direction))
    want = residual @ model.get_output_embeddings().weight.T
    path = logit_path(model, site)
    torch.testing.assert_close(path.raw(direction) @ path.unembedding.T, want, rtol=1e-4, atol=1e-4)


def test_gains_of_both_kinds_of_gemma_and_llama_differ_by_one(model, family):
    norm = final_norm(model, adapter_of(model))
    found = gain_of(norm, 32)
    offset = 1 if family.startswith("gemma") else 0
    torch.testing.assert_close(found.gain, torch.as_tensor(norm.weight) + offset, rtol=1e-3, atol=1e-3)
    assert found.is_centring == (family in ("gpt2", "gpt_neox"))


@pytest.mark.parametrize("width", [7, 8])
def test_gains_at_odd_and_even_width(width):
    for norm in (nn.LayerNorm(width), nn.RMSNorm(width)):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(-1, 2, width))
        found = gain_of(norm, width)
        torch.testing.assert_close(found.gain, norm.weight, rtol=1e-4, atol=1e-4)
        assert found.is_centring == isinstance(norm, nn.LayerNorm)


def test_what_is_no_norm_is_refused():
    with pytest.raises(ModelError, match="neither RMSNorm nor LayerNorm"):
        gain_of(nn.Linear(8, 8), 8)


def test_directions_of_another_site_are_refused(gemma2):
    with pytest.raises(ShapeMismatch, match="d_in=3"):
        logit_path(gemma2, Site("resid_post", 0)).through_norms(torch.zeros(1, 3))
    headless = deepcopy(gemma2)
    headless.get_output_embeddings = lambda: None
    with pytest.raises(ModelError, match="no output embeddings"):
        logit_path(headless, Site("resid_post", 0))


def test_the_way_is_told_in_words(gemma2):
    assert logit_path(gemma2, Site("attn_out", 0)).words == "W_O, post-attention norm's gain, final norm's gain, unembedding"
    assert logit_path(gemma2, Site("mlp_out", 0)).words == "final norm's gain, unembedding"
