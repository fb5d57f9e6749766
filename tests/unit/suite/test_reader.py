"""One SAE, written in every format, reads back to the same function."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_scope import random_sae
from torch.testing import assert_close

from everyscope.base.errors import ConfigError, DataError, NonFinite, ShapeMismatch
from everyscope.publish.formats import write_npz, write_saelens
from everyscope.sae.files import save_sae
from everyscope.sae.folded import Sae
from everyscope.sites.names import Site
from everyscope.suite.reader import load_sae

SAE = random_sae(6, 40, 0.2, torch.linspace(-1, 1, 6), seed=0)
X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + SAE.b_dec


def saelens_folder(folder: Path, sae: Sae = SAE, **changes) -> Path:
    write_saelens(folder, sae, Site("resid_post", 3), "tiny", {}, {})
    config = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


def assert_same(sae: Sae) -> None:
    assert torch.equal(sae.encode(X), SAE.encode(X))
    assert torch.equal(sae(X), SAE(X))


def test_every_format_gives_identical_reconstructions(tmp_path: Path):
    write_npz(tmp_path / "gemma_scope", SAE)
    save_sae(tmp_path / "ours", SAE, {})
    for path in ("gemma_scope", "gemma_scope/params.npz", "ours"):
        assert_same(load_sae(tmp_path / path))
    assert_same(load_sae(str(saelens_folder(tmp_path / "saelens"))))
    write_npz(tmp_path / "saelens", SAE)
    assert_same(load_sae(tmp_path / "saelens"))


@pytest.mark.parametrize("flag", [True, "absent"])
def test_a_subtracted_b_dec_is_folded_into_b_enc(tmp_path: Path, flag: bool | str):
    """SAELens computes (x - b_dec) @ W_enc + b_enc where the flag is true, or not given at all."""
    unfolded = Sae(SAE.w_enc, SAE.w_dec, SAE.b_enc + SAE.b_dec @ SAE.w_enc, SAE.b_dec, SAE.threshold)
    read = load_sae(saelens_folder(tmp_path, unfolded, apply_b_dec_to_input=flag))
    assert_close(read.encode(X), unfolded.encode(X - SAE.b_dec), rtol=1e-5, atol=1e-6)
    assert_close(read(X), SAE(X), rtol=1e-5, atol=1e-6)


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_npz(tmp_path / "layer_3/width_1k/average_l0_9", SAE)
    asked = []

    def folder(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns[0]))
        return str(tmp_path)

    def file(repo: str, filename: str) -> str:
        asked.append((repo, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    inside = "layer_3/width_1k/average_l0_9"
    assert_same(load_sae(f"google/gemma-scope-2b-pt-res/{inside}"))
    assert_same(load_sae(f"google/gemma-scope-2b-pt-res/{inside}/params.npz"))
    assert asked == [("google/gemma-scope-2b-pt-res", f"{inside}/params.npz")] * 2


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise OSError("no network\nhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="no network here") as caught:
        load_sae("org/repo/folder")
    assert "\n" not in str(caught.value)


def test_what_is_no_sae_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no such path"):
        load_sae("nothing/here")
    with pytest.raises(DataError, match="holds no SAE"):
        load_sae(tmp_path)
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(DataError, match="load_suite"):
        load_sae(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="npz"):
        load_sae(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.array([object()], dtype=object))
    with pytest.raises(DataError, match="npz"):
        load_sae(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((2, 3)))
    with pytest.raises(ShapeMismatch, match="W_dec"):
        load_sae(tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in SAE.tensors().items()}
    np.savez(tmp_path / "params.npz", **arrays | {"b_enc": np.full(40, np.nan, np.float32)})
    with pytest.raises(NonFinite, match="b_enc"):
        load_sae(tmp_path)
    np.savez(tmp_path / "params.npz", **arrays, scaling_factor=np.full(6, 2.0))
    with pytest.raises(ConfigError, match="scaling_factor"):
        load_sae(tmp_path)


@pytest.mark.parametrize("changes", [{"architecture": "topk"}, {"normalize_activations": "expected_average_only_in"}])
def test_another_kind_of_saelens_sae_is_refused(tmp_path: Path, changes: dict[str, str]):
    with pytest.raises(ConfigError, match="only jumprelu"):
        load_sae(saelens_folder(tmp_path, **changes))


def test_damaged_saelens_weights_are_refused(tmp_path: Path):
    saelens_folder(tmp_path)
    save_file({"W_enc": SAE.w_enc}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ShapeMismatch, match="W_dec"):
        load_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="safetensors"):
        load_sae(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("d_sae", 7), ("d_in", 1), ("d_sae", "many")])
def test_weights_of_another_cfg_are_refused(tmp_path, field, value):
    folder = saelens_folder(tmp_path)
    config = json.loads((folder / "cfg.json").read_text()) | {field: value}
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatch, match=rf"sae_weights\.safetensors: has {field}="):
        load_sae(folder)


@pytest.mark.parametrize("value", [[], None, 3, "jumprelu"])
def test_a_cfg_that_is_no_object_is_one_line(tmp_path, value):
    folder = saelens_folder(tmp_path)
    (folder / "cfg.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"cfg\.json: holds .*expected a JSON object"):
        load_sae(folder)
