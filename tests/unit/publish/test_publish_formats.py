import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_scope import random_sae

from everyscope.publish.formats import write_saelens
from everyscope.sites.names import Site
from everyscope.suite.formats import gemma_scope

SAE = random_sae(6, 40, 0.2, torch.linspace(-1, 1, 6), seed=0)


def test_params_npz_reads_back_with_plain_numpy(tmp_path: Path):
    gemma_scope.write(tmp_path, SAE)
    with np.load(tmp_path / "params.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"]
        p = dict(arrays)
    assert all(array.dtype == np.float32 for array in p.values())
    assert (p["W_enc"].shape, p["W_dec"].shape) == ((6, 40), (40, 6))
    x = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    pre = x @ p["W_enc"] + p["b_enc"]
    x_hat = ((pre > p["threshold"]) * np.maximum(pre, 0)) @ p["W_dec"] + p["b_dec"]
    np.testing.assert_allclose(x_hat, SAE(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("site", "hook", "reshape"),
    [
        (Site("attn_out", 3), "blocks.3.attn.hook_z", "hook_z"),
        (Site("mlp_out", 0), "blocks.0.hook_mlp_out", "none"),
        (Site("resid_post", 12), "blocks.12.hook_resid_post", "none"),
    ],
)
def test_cfg_json_says_what_saelens_needs(tmp_path: Path, site: Site, hook: str, reshape: str):
    write_saelens(tmp_path, SAE, site, "gemma-2-2b", {"num_tokens": 7}, {"l0": 3.0, "context": 256, "data": "text"})
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["dtype"]) == ("jumprelu", 6, 40, "float32")
    assert config["apply_b_dec_to_input"] is False
    assert (config["metadata"]["hook_name"], config["reshape_activations"]) == (hook, reshape)
    assert config["metadata"]["sae_lens_version"] == "6.54.12"
    assert config["metadata"]["l0"] == 3.0
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in SAE.tensors().items())


def test_bytes_do_not_vary(tmp_path: Path):
    for name in ("a", "b"):
        gemma_scope.write(tmp_path / name, SAE)
        write_saelens(tmp_path / name, SAE, Site("mlp_out", 0), "m", {}, {})
    for file in ("params.npz", "cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
