"""SAELens' folders: four kinds of SAEs and four architectures of transcoders."""

import json
from pathlib import Path

import numpy as np
import pytest
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
from safetensors.numpy import save_file

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.suite.reader import load_sae

D_OUTS = {"transcoder": D_OUT, "skip_transcoder": D_OUT, "jumprelu_transcoder": D_OUT, "jumprelu_skip_transcoder": D_OUT}


def folder_of(path: Path, tensors: dict, metadata: dict | None = None, **config) -> Path:
    path.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "sae_weights.safetensors")
    said = {"d_in": 6, "d_sae": 40, "dtype": "float32", "normalize_activations": "none", "apply_b_dec_to_input": False}
    known = {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"}
    (path / "cfg.json").write_text(json.dumps(said | {"metadata": known | (metadata or {})} | config))
    return path


@pytest.mark.parametrize("architecture", D_OUTS)
def test_a_transcoder_is_what_its_formula_says(tmp_path: Path, architecture: str):
    a = arrays(D_OUT)
    tensors = {name: a[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    tensors |= {"threshold": a["threshold"]} if "jumprelu" in architecture else {}
    tensors |= {"W_skip": a["W_skip"].T} if "skip" in architecture else {}  # [d_out, d_in]
    hooks = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    path = folder_of(tmp_path / "a", tensors, hooks, architecture=architecture, d_out=D_OUT)

    f = jumprelu(X @ a["W_enc"] + a["b_enc"], tensors.get("threshold", 0))
    y = f @ a["W_dec"] + a["b_dec"] + (X @ tensors["W_skip"].T if "skip" in architecture else 0)
    known = assert_reads_as(path, f, y).metadata
    assert (known.site, known.target, known.convention) == (Site("mlp_in", 3), Site("mlp_out", 3), "mlp_input")


@pytest.mark.parametrize("subtracts", [False, True])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_an_sae_is_what_its_formula_says(tmp_path: Path, architecture: str, subtracts: bool):
    a, random = arrays(), np.random.default_rng(1)
    gate, r_mag = (random.normal(size=40).astype(np.float32) for _ in range(2))
    tensors = {name: a[name] for name in ("W_enc", "W_dec", "b_dec")}
    tensors |= {"r_mag": r_mag, "b_gate": gate, "b_mag": a["b_enc"]} if architecture == "gated" else {"b_enc": a["b_enc"]}
    tensors |= {"threshold": a["threshold"]} if architecture == "jumprelu" else {}
    path = folder_of(tmp_path / "a", tensors, architecture=architecture, apply_b_dec_to_input=subtracts, k=4)

    u = (X - a["b_dec"] * subtracts) @ a["W_enc"]
    f = {
        "standard": np.maximum(u + a["b_enc"], 0),
        "jumprelu": jumprelu(u + a["b_enc"], a["threshold"]),
        "topk": largest(u + a["b_enc"], 4),
        "gated": (u + gate > 0) * np.maximum(u * np.exp(r_mag) + a["b_enc"], 0),
    }[architecture]
    found = assert_reads_as(path, f, f @ a["W_dec"] + a["b_dec"])
    assert found.metadata.site == Site("resid_post", 3)
    assert found.top_k == (4 if architecture == "topk" else None)


def test_topk_may_choose_by_what_latents_write(tmp_path: Path):
    """`rescale_acts_by_decoder_norm`: the largest f_i |d_i|, which are also what is reported."""
    a = arrays()
    tensors = {name: a[name] for name in ("W_enc", "W_dec", "b_dec", "b_enc")}
    path = folder_of(tmp_path / "a", tensors, architecture="topk", k=4, rescale_acts_by_decoder_norm=True)
    norms = np.linalg.norm(a["W_dec"], axis=1)
    f = largest((X @ a["W_enc"] + a["b_enc"]) * norms, 4)
    assert_reads_as(path, f, (f / norms) @ a["W_dec"] + a["b_dec"])


def test_topk_of_before_version_6(tmp_path: Path):
    a = arrays()
    tensors = {name: a[name] for name in ("W_enc", "W_dec", "b_dec", "b_enc")}
    old = {"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 4}}
    path = folder_of(tmp_path / "a", tensors)
    (path / "cfg.json").write_text(
        json.dumps({**old, "d_in": 6, "apply_b_dec_to_input": False, "hook_name": "blocks.5.hook_mlp_out"})
    )
    f = largest(X @ a["W_enc"] + a["b_enc"], 4)
    assert assert_reads_as(path, f, f @ a["W_dec"] + a["b_dec"]).metadata.site == Site("mlp_out", 5)


@pytest.mark.parametrize(
    ("hooks", "convention"),
    [
        ({"hook_name": "blocks.3.ln2.hook_normalized"}, "normalised"),
        ({"hook_name": "blocks.3.mlp.hook_in"}, "mlp_input"),
        ({"hook_name": "blocks.3.hook_resid_mid"}, "residual"),
        ({"hook_name": "blocks.3.hook_mlp_in"}, "residual"),
        # what SAELens writes of Gemma Scope 2: its hook is another place than the module beside it, which is right
        ({"hook_name": "blocks.3.hook_mlp_in", "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output"}, "mlp_input"),
    ],
)
def test_hooks_say_what_the_mlps_input_is(tmp_path: Path, hooks: dict[str, str], convention: str):
    tensors = {name: array for name, array in arrays().items() if name != "W_skip"}
    said = hooks | {"hook_name_out": "blocks.3.hook_mlp_out"}
    known = load_sae(folder_of(tmp_path / "a", tensors, said, architecture="jumprelu_transcoder", d_out=6)).metadata
    assert (known.convention, known.target) == (convention, Site("mlp_out", 3))


@pytest.mark.parametrize("kind", [{}, {"top_k": 4}, {"skip": True}, {"d_out": D_OUT, "metadata": TRANSCODER}])
def test_a_round_trip_gives_the_same_bytes(tmp_path: Path, kind: dict):
    coder(**kind).save(tmp_path / "a")
    load_sae(tmp_path / "a").save(tmp_path / "b")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert_equal_coders(load_sae(tmp_path / "b"), coder(**kind))
    assert load_sae(tmp_path / "b").metadata == coder(**kind).metadata


def test_what_has_no_folded_form_is_refused(tmp_path: Path):
    tensors = {name: array for name, array in arrays().items() if name != "W_skip"}
    for number, architecture in enumerate(("temporal", "matching_pursuit", "abstopk")):
        assert_refused(folder_of(tmp_path / str(number), tensors, architecture=architecture), architecture, ConfigError)
    path = folder_of(tmp_path / "a", tensors, architecture="jumprelu_transcoder", apply_b_dec_to_input=True)
    assert_refused(path, "b_dec of a transcoder is no input", ConfigError)
    path = folder_of(tmp_path / "b", tensors, architecture="jumprelu_skip_transcoder")
    assert_refused(path, "has no tensor W_skip", ShapeMismatch)
    path = folder_of(tmp_path / "c", tensors, architecture="jumprelu_transcoder", d_out=7)
    assert_refused(path, "has d_out=6, cfg.json says 7", ShapeMismatch)
    path = folder_of(tmp_path / "d", tensors, architecture="topk")
    assert_refused(path, "k=None, expected a whole number", ConfigError)
    with pytest.raises(ConfigError, match="no TopK transcoder"):
        coder(skip=True, top_k=4).save(tmp_path / "e")
