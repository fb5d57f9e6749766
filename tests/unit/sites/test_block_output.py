"""Blocks that return tuples, as in transformers 4.5x."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from everyscope.sites import block_output
from everyscope.sites.capture import capture, capturing
from everyscope.sites.identity import check_residual_identity
from everyscope.sites.names import SUBLAYERS, Site, sites_of
from everyscope.sites.splice import resuming, splice

D_MODEL, CONTEXT = 8, 5


class TupleAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.v_proj, self.o_proj = nn.Linear(D_MODEL, 12), nn.Linear(12, D_MODEL)

    def forward(self, hidden_states):
        mixed = self.v_proj(hidden_states).cumsum(1)
        return self.o_proj(mixed), None


class TupleBlock(nn.Module):
    """Returns (hidden_states, weights) and is called by keyword."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn, self.mlp = TupleAttention(), nn.Linear(D_MODEL, D_MODEL)
        self.post_attention_layernorm = nn.LayerNorm(D_MODEL)

    def forward(self, hidden_states, past_key_values=None, position_embeddings=None):
        if past_key_values is not None:
            past_key_values.append(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), None


class TupleModel(nn.Module):
    def __init__(self, model_type="llama"):
        super().__init__()
        self.config = SimpleNamespace(model_type=model_type, hidden_size=D_MODEL, vocab_size=20, bos_token_id=2)
        self.model: Any = nn.Module()
        self.model.embed = nn.Embedding(20, D_MODEL)
        self.model.layers = nn.ModuleList(TupleBlock(self.config, layer) for layer in range(3))
        self.cache = []

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.model.embed(input_ids)
        for block in self.model.layers:
            hidden = block(hidden_states=hidden, past_key_values=self.cache, position_embeddings=(hidden, hidden))[0]
        return hidden @ self.model.embed.weight.T


@pytest.fixture
def tuples():
    torch.manual_seed(3)
    return TupleModel().requires_grad_(False)


@pytest.fixture
def ids():
    return torch.arange(2 * CONTEXT).view(2, CONTEXT)


def test_tuple_blocks_are_captured_spliced_and_proved(tuples, ids):
    clean = tuples(ids)
    sites = sites_of(SUBLAYERS, None, 3)
    assert check_residual_identity(tuples) < 1e-6
    assert all(
        x.shape == (2, CONTEXT, 12 if site.kind == "attn_out" else D_MODEL) for site, x in capture(tuples, sites, ids).items()
    )
    with splice(tuples, dict.fromkeys(sites, torch.clone)):
        assert torch.equal(tuples(ids), clean)
    for site in sites:
        with splice(tuples, {site: torch.zeros_like}), capturing(tuples, [site]) as found:
            assert not torch.allclose(tuples(ids), clean)
        assert torch.equal(found[site].abs().sum(-1) == 0, ids != 2)


def test_tuple_blocks_resume_with_tuples(tuples, ids):
    clean = tuples(ids)
    for layer in range(3):
        site = Site("resid_post", layer)
        with resuming(tuples, layer, capture(tuples, [site], ids)[site]):
            assert torch.equal(tuples(ids), clean)


def test_asking_what_a_block_returns_runs_no_hook_writes_no_cache_and_draws_no_random_number(tuples, ids, monkeypatch):
    monkeypatch.setattr(block_output, "_KNOWN", {})
    block = tuples.model.layers[0]
    block.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    block.mlp.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state = torch.get_rng_state()
    hidden = torch.zeros(2, CONTEXT, D_MODEL)
    assert block_output.returns_tuple(block, tuples.config, (), {"hidden_states": hidden, "past_key_values": tuples.cache})
    assert tuples.cache == []
    assert torch.equal(torch.get_rng_state(), state)
