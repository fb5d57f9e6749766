"""Which format a file is of, and every coder below a folder."""

from pathlib import Path

import pytest
from invented_coders import TRANSCODER, assert_equal_coders, assert_refused, coder

from everyscope.base.errors import ConfigError, DataError
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.targets import load_targets
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.suite.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    qwen_scope,
    sparsify,
)
from everyscope.suite.formats.hooks import NOWHERE, module_name, module_place, place
from everyscope.suite.formats.known import FORMATS, coders_below, coders_in, format_of, read_coder
from everyscope.suite.reader import load_sae
from everyscope.text.config import TextConfig


def write_all(root: Path) -> None:
    """One coder or more in every format."""
    gemma_scope.write(root / "Gemma Scope", coder())
    gemma_scope_2.write(root / "Gemma Scope 2", coder())
    coder().save(root / "SAELens")
    sparsify.write(root / "sparsify/layers.3", coder(top_k=4))
    dictionary_learning.write(root / "dictionary_learning", coder())
    llama_scope.write(root / "Llama Scope", coder())
    qwen_scope.write(root / "Qwen-Scope", coder(top_k=4), num_layers=4)
    layers = [coder(skip=True, metadata=TRANSCODER) for _ in range(12)]
    circuit_tracer.write(root / "circuit-tracer", layers, model="gpt2", output="hook_mlp_out", scan="a")


def test_every_format_is_known_by_its_files(tmp_path: Path):
    write_all(tmp_path)
    found = list(coders_below(tmp_path))
    assert {one.name for one, _ in found} == {one.name for one in FORMATS}
    for one, weights in found:
        assert weights.relative_to(tmp_path).parts[0] == one.name
        assert format_of(weights) is one
        assert one.known(weights) == one.read(weights).metadata == read_coder(weights).metadata
    layers = [weights.name for one, weights in found if one.name == "circuit-tracer"]
    assert layers == [f"layer_{layer}.safetensors" for layer in range(12)]  # by number: 2 before 10


def test_a_folder_in_two_formats_counts_once(tmp_path: Path):
    """As our suites are: SAELens' pair and params.npz."""
    coder().save(tmp_path)
    gemma_scope.write(tmp_path, coder(seed=1))
    ((one, weights),) = coders_below(tmp_path)
    assert (one.name, weights.name) == ("SAELens", "sae_weights.safetensors")
    assert_equal_coders(read_coder(tmp_path), coder())


def test_files_of_no_format_are_one_line(tmp_path: Path):
    assert coders_in(tmp_path) == []
    for name in ("sae.safetensors", "ae.pt", "layer_0.safetensors", "params.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
        assert_refused(tmp_path / name, "no file of weights that is known here; expected sae_weights.safetensors with", DataError)
    assert_refused(tmp_path, r"holds no SAE or transcoder; expected .*circuit-tracer\)$", DataError)


@pytest.mark.parametrize(
    ("name", "file"),
    [("Gemma Scope 2", "params.safetensors"), ("sparsify", "layers.3/sae.safetensors"), ("Qwen-Scope", "layer3.sae.pt")],
)
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><p>404"])
def test_damaged_downloads_are_one_line(tmp_path: Path, name: str, file: str, content: bytes):
    write_all(tmp_path)
    path = tmp_path / name / file
    path.write_bytes(content)
    assert_refused(path, f"{path.name}: (cannot be read as|is a Git LFS pointer|is an HTML page)", DataError)


def test_names_of_places():
    assert place("blocks.4.ln2.hook_normalized") == (Site("mlp_in", 4), "normalised")
    assert place("blocks.4.mlp.hook_out") == place("blocks.4.hook_mlp_out") == (Site("mlp_out", 4), None)
    assert place("blocks.4.hook_resid_mid") == (Site("resid_mid", 4), "residual")
    assert place("blocks.4.hook_attn_out") == place("None") == NOWHERE
    assert module_place("model.language_model.layers.4.pre_feedforward_layernorm.output") == (Site("mlp_in", 4), "mlp_input")
    assert module_place("model.layers.{5,9,12,15}.output") == NOWHERE
    for kind in ("resid_post", "attn_out", "mlp_out", "mlp_in"):
        assert module_place(module_name(Site(kind, 7)))[0] == Site(kind, 7)


@pytest.mark.parametrize(
    ("weights", "config"), [("params_layer_0.safetensors", "config.json"), ("W_enc_0.safetensors", "config.yaml")]
)
def test_coders_of_several_layers_are_refused_by_name(tmp_path: Path, weights: str, config: str):
    folder = tmp_path / "clt/width_262k_l0_big"
    folder.mkdir(parents=True)
    (folder / config).write_text("{}")
    (folder / weights).write_bytes(b"")
    for path in (folder, folder / weights):
        with pytest.raises(ConfigError, match="is a crosscoder or cross-layer transcoder"):
            load_sae(path)
    wanted = EvaluateConfig(model=ModelConfig(name="tiny"), text=TextConfig(), trained=tmp_path, out=tmp_path / "scores")
    with pytest.raises(ConfigError, match="is a crosscoder or cross-layer transcoder"):
        load_targets(wanted)
