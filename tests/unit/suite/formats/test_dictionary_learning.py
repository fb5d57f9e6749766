"""ae.pt and config.json of dictionary_learning: seven classes, read without running code."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import (
    X,
    arrays,
    assert_equal_coders,
    assert_reads_as,
    assert_refused,
    assert_same_function,
    coder,
    jumprelu,
    largest,
)

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.suite.formats import dictionary_learning
from everyscope.suite.reader import load_sae

K = 4
LINEAR = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "GatedAutoEncoder")


def state_of(name: str, a: dict) -> dict:
    """The tensors that a class has, under its names."""
    if name in LINEAR:
        state = {"encoder.weight": a["W_enc"].T, "decoder.weight": a["W_dec"].T}
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(name, "b_dec")
        gates = {"r_mag": a["threshold"], "gate_bias": a["b_enc"], "mag_bias": a["b_enc"][::-1]}
        state |= {bias: a["b_dec"]} | (gates if name == "GatedAutoEncoder" else {"encoder.bias": a["b_enc"]})
    else:
        state = {key: a[key] for key in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if name == "JumpReluAutoEncoder":
        state["threshold"] = a["threshold"]
    if "TopK" in name:
        state |= {"threshold": np.float32(0.7), "k": np.int32(K)}
    return {key: torch.tensor(np.asarray(array).copy()) for key, array in state.items()}


def folder_of(path: Path, name: str, state: object, **trainer) -> Path:
    path.mkdir(parents=True)
    torch.save(state, path / "ae.pt")
    said = {"dict_class": name, "activation_dim": 6, "dict_size": 40, "k": K, "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
    said |= {"submodule_name": "resid_post_layer_3"}
    (path / "config.json").write_text(json.dumps({"trainer": said | trainer, "buffer": {"ctx_len": 128}}))
    return path


@pytest.mark.parametrize("name", [*LINEAR, "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_each_class_is_what_its_formula_says(tmp_path: Path, name: str):
    a = arrays()
    u = (X if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else X - a["b_dec"]) @ a["W_enc"]
    pre = u + a["b_enc"]
    if name == "GatedAutoEncoder":
        f = (pre > 0) * np.maximum(np.exp(a["threshold"]) * u + a["b_enc"][::-1], 0)
    elif name == "AutoEncoderTopK":
        f = largest(pre, K)
    else:
        f = jumprelu(pre, {"JumpReluAutoEncoder": a["threshold"]}.get(name, 0.7 if "TopK" in name else 0))
    found = assert_reads_as(folder_of(tmp_path / "a", name, state_of(name, a)), f, f @ a["W_dec"] + a["b_dec"])
    assert (found.metadata.site, found.metadata.model) == (Site("resid_post", 3), "EleutherAI/pythia-70m")


def test_a_batch_topk_without_a_threshold_yet_is_relu(tmp_path: Path):
    """-1 is how the threshold begins; every positive latent passes it."""
    a = arrays()
    state = state_of("BatchTopKSAE", a) | {"threshold": torch.tensor(-1.0)}
    f = np.maximum((X - a["b_dec"]) @ a["W_enc"] + a["b_enc"], 0)
    assert_reads_as(folder_of(tmp_path / "a", "BatchTopKSAE", state), f, f @ a["W_dec"] + a["b_dec"])


def test_a_round_trip(tmp_path: Path):
    dictionary_learning.write(tmp_path / "a", coder())
    assert_equal_coders(load_sae(tmp_path / "a"), coder())
    dictionary_learning.write(tmp_path / "b", load_sae(tmp_path / "a"))
    assert (tmp_path / "a/ae.pt").read_bytes() == (tmp_path / "b/ae.pt").read_bytes()
    dictionary_learning.write(tmp_path / "c", coder(top_k=K))
    assert_same_function(load_sae(tmp_path / "c"), coder(top_k=K))
    assert load_sae(tmp_path / "c").metadata.site == coder().metadata.site


def test_nothing_in_a_file_runs(tmp_path: Path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable, tuple]:
            return Path.write_text, (marker, "x")

    path = folder_of(tmp_path / "a", "AutoEncoder", {"encoder.weight": Evil()})
    assert_refused(path, r"ae\.pt: holds more than tensors.*maker's code", DataError)
    (path / "ae.pt").write_bytes(pickle.dumps(Evil()))
    assert_refused(path, r"ae\.pt: is a bare pickle", DataError)
    torch.save({"a": torch.zeros(3)}, path / "ae.pt", _use_new_zipfile_serialization=False)
    assert_refused(path, r"ae\.pt: is a bare pickle", DataError)
    assert not marker.exists()


def test_other_files_are_refused(tmp_path: Path):
    a = arrays()
    state = state_of("AutoEncoder", a)
    assert_refused(
        folder_of(tmp_path / "a", "CrossCoder", state), "dict_class is 'CrossCoder'; AutoEncoder, .* can be read", ConfigError
    )
    assert_refused(folder_of(tmp_path / "b", "JumpReluAutoEncoder", state), "has no tensor W_enc", ShapeMismatch)
    assert_refused(folder_of(tmp_path / "c", "AutoEncoder", [1, 2]), "holds a list, expected a dict", DataError)
    path = folder_of(tmp_path / "d", "AutoEncoderTopK", state_of("AutoEncoderTopK", a), k=K + 1)
    assert_refused(path, "k is 4, config.json says 5", DataError)
    (path / "ae.pt").write_bytes(b"<html>not found</html>")
    assert_refused(path, "is an HTML page", DataError)
    (path / "config.json").write_text("[]")
    assert_refused(path, "expected a JSON object", DataError)
    with pytest.raises(ConfigError, match="holds SAEs alone"):
        dictionary_learning.write(tmp_path / "e", coder(skip=True))
