"""circuit-tracer's sets: config.yaml and layer_<n>.safetensors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import (
    D_OUT,
    TRANSCODER,
    X,
    arrays,
    assert_equal_coders,
    assert_reads_as,
    assert_refused,
    coder,
    jumprelu,
    largest,
)
from safetensors.numpy import load_file, save_file
from safetensors.torch import save

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.suite.formats import circuit_tracer
from everyscope.suite.reader import load_sae

CONFIG = """# of a person
model_name: "meta-llama/Llama-3.2-1B"
model_kind: transcoder_set
feature_input_hook: mlp.hook_in   # with the gain
feature_output_hook: 'mlp.hook_out'
transcoders:
- hf://org/repo/layer_0.safetensors?revision=a
- hf://org/repo/layer_1.safetensors
"""


def set_of(path: Path, layers: list[dict], config: str = CONFIG, has_threshold: bool = True, more: dict | None = None) -> Path:
    path.mkdir(parents=True)
    for layer, a in enumerate(layers):
        tensors = {"W_enc": a["W_enc"].T, "W_dec": a["W_dec"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
        tensors |= {"activation_function.threshold": a["threshold"]} if has_threshold else {}
        tensors |= {"W_skip": a["W_skip"].T} if "W_skip" in a else {}
        contiguous = {name: np.ascontiguousarray(array) for name, array in (tensors | (more or {})).items()}
        save_file(contiguous, path / f"layer_{layer}.safetensors")
    (path / "config.yaml").write_text(config)
    return path


@pytest.mark.parametrize("has_threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_a_layer_is_what_its_formula_says(tmp_path: Path, has_threshold: bool, skip: bool):
    layers = [{name: array for name, array in arrays(seed=seed).items() if skip or name != "W_skip"} for seed in (0, 1)]
    path = set_of(tmp_path / "a", layers, has_threshold=has_threshold)
    for layer, a in enumerate(layers):
        f = jumprelu(X @ a["W_enc"] + a["b_enc"], a["threshold"] if has_threshold else 0)
        y = f @ a["W_dec"] + a["b_dec"] + (X @ a["W_skip"] if skip else 0)
        known = assert_reads_as(path / f"layer_{layer}.safetensors", f, y).metadata
        assert (known.site, known.target, known.convention) == (Site("mlp_in", layer), Site("mlp_out", layer), "mlp_input")
        assert known.model == "meta-llama/Llama-3.2-1B"


def test_a_topk_layer_is_what_its_formula_says(tmp_path: Path):
    a = {name: array for name, array in arrays().items() if name != "W_skip"}
    path = set_of(tmp_path / "a", [a], CONFIG + "activation: topk\nk: 4\n", has_threshold=False, more={"k": np.int64(4)})
    f = largest(X @ a["W_enc"] + a["b_enc"], 4)
    assert assert_reads_as(path / "layer_0.safetensors", f, f @ a["W_dec"] + a["b_dec"]).top_k == 4
    (path / "config.yaml").write_text(CONFIG)
    assert_refused(path / "layer_0.safetensors", "holds k=4, config.yaml says None; add activation: topk", DataError)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("convention", ["normalised", "mlp_input", "residual"])
def test_a_round_trip_gives_the_same_bytes(tmp_path: Path, skip: bool, convention: str):
    kind = "resid_mid" if convention == "residual" else "mlp_in"
    layers = [
        coder(
            skip=skip,
            seed=layer,
            metadata=replace(TRANSCODER, site=Site(kind, layer), target=Site("mlp_out", layer), convention=convention, l0=None),
        )
        for layer in range(3)
    ]
    known = {"model": "google/gemma-2-2b", "output": "hook_mlp_out", "scan": '/a path/with "quotes"'}
    assert circuit_tracer.write(tmp_path / "a", layers, **known) == 3
    found = [load_sae(path) for path in circuit_tracer.layer_files(tmp_path / "a")]
    for read, wanted in zip(found, layers, strict=True):
        assert_equal_coders(read, wanted)
        assert read.metadata == wanted.metadata
    circuit_tracer.write(tmp_path / "b", found, **known)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    stored = load_file(tmp_path / "a/layer_1.safetensors")
    if skip:
        np.testing.assert_array_equal(stored["W_skip"], layers[1].tensors()["W_skip"].T)
        assert not np.array_equal(stored["W_skip"], stored["W_skip"].T)


def test_a_set_whose_layers_differ_is_refused(tmp_path: Path):
    known = {"model": "gpt2", "output": "hook_mlp_out", "scan": "a"}
    for others in ([coder(skip=True), coder(d_out=D_OUT)], [coder(skip=True), coder(metadata=TRANSCODER)]):
        with pytest.raises(ShapeMismatch, match="layer 1: d_in, d_sae"):
            circuit_tracer.write(tmp_path / "a", others, **known)
    with pytest.raises(ConfigError, match="layer 0: is an SAE"):
        circuit_tracer.write(tmp_path / "a", [coder()], **known)
    with pytest.raises(ConfigError, match="cannot say TopK"):
        circuit_tracer.write(tmp_path / "a", [coder(skip=True, top_k=3)], **known)
    with pytest.raises(ConfigError, match="needs a transcoder of every layer"):
        circuit_tracer.write(tmp_path / "a", [], **known)
    assert not (tmp_path / "a/config.yaml").exists()


def test_what_is_no_set_is_refused(tmp_path: Path):
    path = set_of(tmp_path / "a", [arrays(), arrays(), arrays()])
    assert_refused(path, r"a set of 3 layers \(circuit-tracer\)", DataError)
    (path / "layer_1.safetensors").unlink()
    with pytest.raises(DataError, match="none of layer 1"):
        circuit_tracer.layer_files(path)
    (path / "config.yaml").write_text(CONFIG.replace("transcoder_set", "cross_layer_transcoder"))
    assert_refused(path / "layer_0.safetensors", "model_kind='cross_layer_transcoder'", ConfigError)
    (path / "config.yaml").write_text("a: &anchor\n  b: 1\n")
    assert_refused(path / "layer_0.safetensors", "model_kind=None", ConfigError)
    for text, complaint in (
        ("a: [1\n", "is no YAML"),
        ("[" * 100_000, "is no YAML"),
        ("- a\n", "holds a list"),
        ("!!python/name:os.system x", "is no YAML"),
    ):
        (path / "config.yaml").write_text(text)
        assert_refused(path / "layer_0.safetensors", complaint, DataError)
    path = set_of(tmp_path / "b", [arrays()], more={"gate": np.zeros(3, np.float32)})
    assert_refused(path / "layer_0.safetensors", "holds gate, which no transcoder", DataError)
    path = set_of(tmp_path / "c", [arrays()], CONFIG + "activation: gelu\n")
    assert_refused(path / "layer_0.safetensors", "activation='gelu'", ConfigError)


def test_a_config_is_read_as_yaml(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG + '\nk: 128\nempty:\nflag: true\nplain: some words # a comment\nquoted: "a # b"\n')
    found = circuit_tracer.read_config(path)
    assert found["transcoders"] == ["hf://org/repo/layer_0.safetensors?revision=a", "hf://org/repo/layer_1.safetensors"]
    assert (found["feature_input_hook"], found["feature_output_hook"]) == ("mlp.hook_in", "mlp.hook_out")
    assert (found["k"], found["empty"], found["flag"], found["plain"], found["quoted"]) == (
        128,
        None,
        True,
        "some words",
        "a # b",
    )
    written = {"model_name": 'a "b" \\ c: #', "scan": "ü"}
    path.write_text(circuit_tracer.config_text(written), encoding="utf-8")
    assert circuit_tracer.read_config(path) == written


def test_bfloat16_files_are_read(tmp_path: Path):
    """As published sets are."""
    path = set_of(tmp_path / "a", [arrays()])
    half = {name: tensor.bfloat16() for name, tensor in coder(skip=True).tensors().items()}
    renamed = {"W_enc": half["W_enc"].T, "W_skip": half["W_skip"].T, "activation_function.threshold": half["threshold"]}
    rest = {name: half[name] for name in ("W_dec", "b_enc", "b_dec")}
    (path / "layer_0.safetensors").write_bytes(save({name: tensor.contiguous() for name, tensor in (renamed | rest).items()}))
    found = load_sae(path / "layer_0.safetensors")
    assert found.dtype == torch.float32
    assert torch.equal(found.W_enc, half["W_enc"].float())
