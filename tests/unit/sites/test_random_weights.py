"""The untrained sibling of a model: drawn from a seed, the same in every number format, and none of the trained weights."""

import pytest
import torch
from pydantic import ValidationError

from everyscope.base.errors import ModelError
from everyscope.base.ids import content_id
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model


@pytest.fixture
def folder(tmp_path, gemma2):
    gemma2.save_pretrained(tmp_path / "gemma2")
    return str(tmp_path / "gemma2")


def weights(**settings):
    return dict(load_language_model(ModelConfig(weights="random", **settings)).model.named_parameters())


def test_random_weights_follow_from_the_seed_alone(folder, gemma2):
    state = torch.random.get_rng_state()
    first, again, other = (weights(name=folder, weights_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    trained = dict(gemma2.named_parameters())
    assert first.keys() == trained.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert not parameter.requires_grad
        if parameter.ndim == 2:  # norms start as constants
            assert not torch.equal(parameter, other[name])
            assert not torch.equal(parameter, trained[name])


def test_shorter_formats_round_the_same_weights(folder):
    exact, short = weights(name=folder), weights(name=folder, dtype="bfloat16")
    assert all(torch.equal(parameter.bfloat16(), short[name]) for name, parameter in exact.items())


def test_attention_is_eager_and_the_weights_file_is_not_needed(folder, tmp_path):
    (tmp_path / "gemma2" / "model.safetensors").unlink()
    loaded = load_language_model(ModelConfig(name=folder, weights="random"))
    assert loaded.model.config._attn_implementation == "eager"  # pyright: ignore[reportAttributeAccessIssue]
    assert not loaded.model.training
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(ModelConfig(name=str(tmp_path / "nowhere"), weights="random"))


def test_trained_weights_go_without_saying():
    assert set(ModelConfig().as_json()) == {"name", "revision", "dtype", "device"}
    random = ModelConfig(weights="random", weights_seed=3)
    assert ModelConfig.model_validate(random.as_json()) == random
    assert ModelConfig.model_validate(ModelConfig().as_json()) == ModelConfig()
    ids = {content_id(config.as_json()) for config in (ModelConfig(), random, ModelConfig(weights="random"))}
    assert len(ids) == 3


def test_a_seed_that_nothing_is_drawn_from_is_refused():
    with pytest.raises(ValidationError, match="weights_seed=3"):
        ModelConfig(weights_seed=3)
