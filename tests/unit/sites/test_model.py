import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from everyscope.base.errors import ModelError
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site


@pytest.fixture
def folder(tmp_path, gemma2):
    gemma2.save_pretrained(tmp_path / "gemma2")
    return tmp_path / "gemma2"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_frozen_eager_and_of_the_dtype_asked_for(folder, dtype):
    loaded = load_language_model(ModelConfig(name=str(folder), dtype=dtype))
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "eager"  # pyright: ignore[reportAttributeAccessIssue]
    assert loaded.adapter.width(Site("attn_out", 0)) == 48
    assert loaded.name == str(folder)


def test_a_loaded_model_computes_what_was_saved(folder, gemma2, input_ids, run):
    loaded = load_language_model(ModelConfig(name=str(folder)))
    assert torch.equal(run(loaded.model, input_ids), run(gemma2, input_ids))


BREAKAGES = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config that is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "weights that are no safetensors": lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
    "weights in a pickle": lambda folder: (torch.save({}, folder / "pytorch_model.bin"), (folder / "model.safetensors").unlink()),
    "an index that is a list": lambda folder: (
        (folder / "model.safetensors.index.json").write_text("[]"),
        (folder / "model.safetensors").unlink(),
    ),
    "weights cut short": lambda folder: os.truncate(folder / "model.safetensors", 9000),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_folder_gives_one_clear_line(folder, breakage):
    BREAKAGES[breakage](folder)
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_language_model(ModelConfig(name=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weights", ["trained", "random"])
def test_no_code_of_a_model_runs(folder, tmp_path, weights, monkeypatch):
    """Not even where someone at the terminal would say yes."""
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_language_model(ModelConfig(name=str(folder), weights=weights))
    assert not marker.exists()


def test_a_model_that_lacks_weights_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, as model\.layers\.1\.mlp\.up_proj"):
        load_language_model(ModelConfig(name=str(folder)))


def test_missing_models_and_devices_give_one_clear_line(folder, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_language_model(ModelConfig(name=str(tmp_path / "nothing here")))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="abacus"):
        load_language_model(ModelConfig(name=str(folder), device="abacus"))


def test_a_model_whose_gate_fails_is_refused(folder, bloom, tmp_path):
    bloom.save_pretrained(tmp_path / "bloom")
    with pytest.raises(ModelError, match=r"'bloom'.* not supported"):
        load_language_model(ModelConfig(name=str(tmp_path / "bloom")))
    broken = Gemma2ForCausalLM(Gemma2Config.from_pretrained(folder))
    broken.model.layers[2].mlp.down_proj.weight.data.fill_(torch.nan)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportIndexIssue]
    broken.save_pretrained(folder)
    with pytest.raises(ModelError, match="layer 2"):
        load_language_model(ModelConfig(name=str(folder)))
