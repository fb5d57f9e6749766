import json
import shutil

import pytest
import torch
from huggingface_hub import constants, file_download

from everyscope.activations.harvest import model_handle
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.model_handle import model_identity, open_handle
from everyscope.activations.harvest.run import run
from everyscope.activations.shards.reader import Shards, TokenBlocks
from everyscope.base.errors import ConfigError, ModelError
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import SUBLAYERS, Site, sites_of

SITES = sites_of(("embed", *SUBLAYERS), None, num_layers=2)


@pytest.fixture
def real(config, tiny_random_model_folder) -> HarvestConfig:
    model = ModelConfig(name=str(tiny_random_model_folder))
    return config.model_copy(update={"model": model, "sites": SITES, "num_tokens": 700})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_gives_what_capture_gives(real, dtype):
    real = real.model_copy(update={"dtype": dtype})
    result = run(real)
    assert result.num_rows == 700
    tokens = TokenBlocks(result.tokens)
    want = capture(load_language_model(real.model).model, SITES, tokens.input_ids(0, tokens.num_blocks).long())
    for site, folder in result.folders.items():
        shards = Shards(folder)
        assert shards.d_in == (48 if site.kind == "attn_out" else 32)
        got = shards.rows(0, 700)
        rows = want[site][shards.sequence(0, 700).long(), shards.position(0, 700).long()].to(got.dtype)
        # The batches are cut otherwise here, so products may round otherwise; in bfloat16 by one unit in the last place.
        torch.testing.assert_close(got, rows, rtol=1e-4 if dtype == "float32" else 2**-7, atol=1e-4)


def test_a_finished_harvest_loads_no_model(real, monkeypatch):
    run(real)
    monkeypatch.setattr(model_handle, "load_language_model", None)
    monkeypatch.setattr(model_handle, "load_tokenizer", None)
    assert run(real).num_rows == 700


def test_widths_are_known_without_loading(real, monkeypatch):
    monkeypatch.setattr(model_handle, "load_language_model", None)
    assert open_handle(real).widths == {site: 48 if site.kind == "attn_out" else 32 for site in SITES}


def test_what_the_model_does_not_have_is_refused_before_loading(real, monkeypatch):
    monkeypatch.setattr(model_handle, "load_language_model", None)
    with pytest.raises(ConfigError, match=r"layer 2 is out of range.*0 to 1"):
        run(real.model_copy(update={"sites": (Site("mlp_out", 2),)}))
    with pytest.raises(ConfigError, match=r"context=128.*at most 64"):
        run(real.model_copy(update={"text": real.text.model_copy(update={"context": 128})}))
    with pytest.raises(ModelError, match="no-such-model"):
        run(real.model_copy(update={"model": ModelConfig(name="no-such-model")}))
    assert not real.out.exists()


def test_identity_follows_the_weights(tmp_path, tiny_random_model_folder):
    copy = shutil.copytree(tiny_random_model_folder, tmp_path / "copy")
    identity = model_identity(ModelConfig(name=str(tiny_random_model_folder)))
    assert model_identity(ModelConfig(name=str(copy))) == identity
    (copy / "README.md").write_text("a card")
    assert model_identity(ModelConfig(name=str(copy))) == identity
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"final_logit_softcapping": 1.0}))
    assert model_identity(ModelConfig(name=str(copy))) != identity
    (copy / "config.json").write_text(json.dumps(settings))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert model_identity(ModelConfig(name=str(copy))) != identity


def test_a_model_on_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    """The hub's cache, as huggingface_hub lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--some--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text(commit)
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(file_download, "HF_HUB_CACHE", str(tmp_path), raising=False)
    assert model_identity(ModelConfig(name="some/model")) == f"some/model@{commit}"
    other = commit[::-1]
    assert model_identity(ModelConfig(name="some/model", revision=other)) == f"some/model@{other}"
    with pytest.raises(ModelError, match="no model 'another/model'"):
        model_identity(ModelConfig(name="another/model"))
