"""hyperparams.json and checkpoints/final.safetensors of Llama Scope: normalised inputs and outputs, one threshold for all."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import D_OUT, X, arrays, assert_reads_as, assert_refused, assert_same_function, coder, largest
from safetensors.numpy import save_file

from everyscope.base.errors import ConfigError, DataError
from everyscope.sites.names import Site
from everyscope.suite.formats import llama_scope
from everyscope.suite.reader import load_sae

MEAN_IN, MEAN_OUT, THETA = 4.5, 1.5, 1.25


def folder_of(path: Path, a: dict, **config) -> Path:
    (path / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": a["W_enc"].T,
        "encoder.bias": a["b_enc"],
        "decoder.weight": a["W_dec"].T,
        "decoder.bias": a["b_dec"],
    }
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "checkpoints/final.safetensors")
    said = {
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "d_model": 6,
        "d_sae": 40,
    }
    said |= {
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
    }
    said |= {"act_fn": "jumprelu", "jump_relu_threshold": THETA, "norm_activation": "dataset-wise"}
    (path / "hyperparams.json").write_text(
        json.dumps(said | {"dataset_average_activation_norm": {"in": MEAN_IN, "out": MEAN_OUT}} | config)
    )
    return path


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "relu"])
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize("subtracts", [True, False])
def test_a_folder_is_what_its_formula_says(tmp_path: Path, activation: str, has_norms: bool, subtracts: bool):
    a = arrays()
    said = {"act_fn": activation, "sparsity_include_decoder_norm": has_norms, "apply_decoder_bias_to_pre_encoder": subtracts}
    scale_in, scale_out = math.sqrt(6) / MEAN_IN, math.sqrt(6) / MEAN_OUT
    pre = (scale_in * X - a["b_dec"] * subtracts) @ a["W_enc"] + a["b_enc"]
    norms = np.linalg.norm(a["W_dec"], axis=1) if has_norms else np.ones(40)
    if activation == "topk":
        f = largest(pre * norms, 4) / norms
    else:
        f = np.where(pre * norms > (THETA if activation == "jumprelu" else 0), pre, 0)
    y = (f @ a["W_dec"] + a["b_dec"]) / scale_out
    unit = norms / scale_out if activation == "topk" and has_norms else 1  # of TopK, latents are given as they are compared
    assert_reads_as(folder_of(tmp_path / "a", a, **said), f * unit, y)


def test_a_transcoder_and_its_model_are_known(tmp_path: Path):
    hooks = {"hook_point_in": "blocks.8.ln2.hook_normalized", "hook_point_out": "blocks.8.hook_mlp_out"}
    known = load_sae(folder_of(tmp_path / "Llama3_1-8B-Base-L8TC-8x", arrays(D_OUT), **hooks)).metadata
    assert (known.site, known.target, known.convention) == (Site("mlp_in", 8), Site("mlp_out", 8), "normalised")
    assert known.model == "meta-llama/Llama-3.1-8B"


def test_a_latent_that_writes_nothing_is_silent(tmp_path: Path):
    a = arrays()
    a["W_dec"][3] = 0
    assert (load_sae(folder_of(tmp_path / "a", a)).encode(torch.from_numpy(X))[:, 3] == 0).all()


@pytest.mark.parametrize("kind", [{"top_k": 4}, {"d_out": D_OUT}])
def test_a_round_trip_gives_the_same_function(tmp_path: Path, kind: dict):
    wanted = coder(**kind)
    llama_scope.write(tmp_path / "a", wanted)
    found = load_sae(tmp_path / "a")
    if wanted.top_k is not None:
        assert_same_function(found, wanted)
    else:  # latents in units of their thresholds
        x = torch.from_numpy(X)
        np.testing.assert_allclose(found(x), wanted(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.encode(x) * wanted.threshold, wanted.encode(x), rtol=1e-5, atol=1e-5)
    llama_scope.write(tmp_path / "b", found)
    for name in ("hyperparams.json", "checkpoints/final.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_folded_is_refused(tmp_path: Path):
    a = arrays()
    assert_refused(folder_of(tmp_path / "a", a, norm_activation="token-wise"), "depends on each token", ConfigError)
    assert_refused(folder_of(tmp_path / "b", a, act_fn="prolu"), "act_fn='prolu'", ConfigError)
    assert_refused(
        folder_of(tmp_path / "c", a, dataset_average_activation_norm=None), "dataset_average_activation_norm", DataError
    )
    assert_refused(folder_of(tmp_path / "d", a, use_glu_encoder=True), "use_glu_encoder", ConfigError)
    with pytest.raises(ConfigError, match="holds no skip"):
        llama_scope.write(tmp_path / "e", coder(skip=True))
