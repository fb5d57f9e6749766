"""layer<n>.sae.pt and config.json of Qwen-Scope: TopK SAEs of the residual stream, a file a layer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import X, arrays, assert_equal_coders, assert_reads_as, assert_refused, coder, largest

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.sites.names import Site
from everyscope.suite.formats import qwen_scope
from everyscope.suite.reader import load_sae

K = 4
SAID = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": 6, "d_sae": 40, "k": K, "num_layers": 28}


def set_of(path: Path, layers: dict[int, dict], **config) -> Path:
    path.mkdir(parents=True)
    for layer, a in layers.items():
        state = {"W_enc": a["W_enc"].T, "W_dec": a["W_dec"].T, "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
        torch.save({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}, path / f"layer{layer}.sae.pt")
    (path / "config.json").write_text(json.dumps(SAID | {"hook_point": "resid_post", "dtype": "float32"} | config))
    return path


def test_a_file_is_what_its_formula_says(tmp_path: Path):
    path = set_of(tmp_path / "a", {5: arrays(seed=5), 12: arrays(seed=12)})
    for layer in (5, 12):
        a = arrays(seed=layer)
        f = largest(X @ a["W_enc"] + a["b_enc"], K)
        found = assert_reads_as(path / f"layer{layer}.sae.pt", f, f @ a["W_dec"] + a["b_dec"])
        assert (found.metadata.site, found.metadata.model) == (Site("resid_post", layer), "Qwen/Qwen3-1.7B-Base")
        assert (found.top_k, found.metadata.l0) == (K, K)


def test_a_round_trip_gives_the_same_bytes(tmp_path: Path):
    qwen_scope.write(tmp_path / "a", coder(top_k=K), num_layers=28)
    found = load_sae(tmp_path / "a/layer3.sae.pt")
    assert_equal_coders(found, coder(top_k=K))
    qwen_scope.write(tmp_path / "b", found, num_layers=28)
    for name in ("layer3.sae.pt", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_whole_set_and_other_kinds_are_refused(tmp_path: Path):
    path = set_of(tmp_path / "a", {5: arrays(), 12: arrays()})
    assert_refused(path, r"a set of 2 layers \(Qwen-Scope\); give the file of one, as .*layer5\.sae\.pt", DataError)
    assert_refused(
        set_of(tmp_path / "b", {5: arrays()}, model_type="relu_sae") / "layer5.sae.pt", "model_type='relu_sae'", ConfigError
    )
    assert_refused(set_of(tmp_path / "c", {5: arrays()}, hook_point="mlp_out") / "layer5.sae.pt", "got 'mlp_out'", ConfigError)
    state = {"W_enc": torch.zeros(40, 6), "b_enc": torch.zeros(40)}
    torch.save(state, path / "layer5.sae.pt")
    assert_refused(path / "layer5.sae.pt", "has no tensor W_dec; a Qwen-Scope file has", ShapeMismatch)
    for other, says in ((coder(), "TopK coders without"), (coder(skip=True, top_k=K), "SAEs alone")):
        with pytest.raises(ConfigError, match=says):
            qwen_scope.write(tmp_path / "d", other, num_layers=4)
