"""sparsify's folders: TopK SAEs, transcoders and skip transcoders."""

import json
from pathlib import Path

import numpy as np
import pytest
from invented_coders import X, arrays, assert_reads_as, assert_refused, assert_same_function, coder, largest
from safetensors.numpy import save_file

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.suite.formats import sparsify
from everyscope.suite.reader import load_sae

K = 4


def folder_of(path: Path, a: dict, **config) -> Path:
    path.mkdir(parents=True)
    tensors = {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "W_dec": a["W_dec"], "b_dec": a["b_dec"]}
    tensors |= {"W_skip": a["W_skip"].T} if config.get("skip_connection") else {}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "sae.safetensors")
    said = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 40, "k": K, "signed": False, "d_in": 6}
    (path / "cfg.json").write_text(json.dumps(said | config))
    return path


@pytest.mark.parametrize("transcodes", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_folder_is_what_its_formula_says(tmp_path: Path, transcodes: bool, skip: bool):
    """Files of 2025 say skip_connection and no transcode: sparsify then takes b_dec from the input, not from the skip's."""
    a = arrays()
    said = {"skip_connection": skip} | ({"transcode": True, "activation": "topk"} if transcodes else {})
    path = folder_of(tmp_path / "run/layers.5.mlp", a, **said)
    (tmp_path / "run/config.json").write_text(json.dumps({"model": "meta-llama/Llama-3.2-1B", "k": 1}))
    f = largest((X if transcodes else X - a["b_dec"]) @ a["W_enc"] + a["b_enc"], K)
    found = assert_reads_as(path, f, f @ a["W_dec"] + a["b_dec"] + (X @ a["W_skip"] if skip else 0))
    assert (found.top_k, found.metadata.model, found.metadata.l0) == (K, "meta-llama/Llama-3.2-1B", K)
    assert found.metadata.coder_site == Site("transcoder" if skip or transcodes else "mlp_out", 5)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.3", Site("resid_post", 3)),
        ("h.7", Site("resid_post", 7)),
        ("embed_tokens", Site("embed", 0)),
        ("layers.2.attn", None),
    ],
)
def test_a_folders_name_is_the_module(tmp_path: Path, name: str, site: Site | None):
    assert load_sae(folder_of(tmp_path / name, arrays())).metadata.site == site


@pytest.mark.parametrize("skip", [None, False, True])
def test_a_round_trip_gives_the_same_function(tmp_path: Path, skip: bool | None):
    wanted = coder(top_k=K) if skip is None else coder(skip=skip, top_k=K, metadata=coder(skip=True).metadata)
    sparsify.write(tmp_path / "a/layers.3.mlp", wanted)
    found = load_sae(tmp_path / "a/layers.3.mlp")
    assert_same_function(found, wanted)
    assert found.is_transcoder == (skip is not None)
    sparsify.write(tmp_path / "b/layers.3.mlp", found)
    assert_same_function(load_sae(tmp_path / "b/layers.3.mlp"), wanted)
    if skip is not None:  # nothing is folded, so nothing is rounded
        assert (tmp_path / "a/layers.3.mlp/sae.safetensors").read_bytes() == (
            tmp_path / "b/layers.3.mlp/sae.safetensors"
        ).read_bytes()


def test_other_kinds_are_refused(tmp_path: Path):
    a = arrays()
    assert_refused(folder_of(tmp_path / "a", a, activation="groupmax"), "activation='groupmax'", ConfigError)
    assert_refused(folder_of(tmp_path / "b", a, signed=True), "signed=True", ConfigError)
    assert_refused(folder_of(tmp_path / "c", a, k=None), "k=None", ConfigError)
    path = folder_of(tmp_path / "d", a, skip_connection=True)
    (path / "cfg.json").write_text((path / "cfg.json").read_text().replace('"skip_connection": true', '"skip_connection": false'))
    assert_refused(path, "has a W_skip, cfg.json says skip_connection=False", ShapeMismatch)
    with pytest.raises(ConfigError, match="TopK coders without thresholds"):
        sparsify.write(tmp_path / "e", coder())
