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
from everyscope.publish.formats import write_saelens
from everyscope.sae.files import write_sae
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.formats import gemma_scope
from everyscope.suite.reader import load_sae, model_of

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
    gemma_scope.write(tmp_path / "gemma_scope", SAE)
    write_sae(tmp_path / "ours", SAE, {})
    for path in ("gemma_scope", "gemma_scope/params.npz", "ours"):
        assert_same(load_sae(tmp_path / path))
    assert_same(load_sae(str(saelens_folder(tmp_path / "saelens"))))
    gemma_scope.write(tmp_path / "saelens", SAE)
    assert_same(load_sae(tmp_path / "saelens"))


@pytest.mark.parametrize("flag", [True, "absent"])
def test_a_subtracted_b_dec_is_folded_into_b_enc(tmp_path: Path, flag: bool | str):
    """SAELens computes (x - b_dec) @ W_enc + b_enc where the flag is true, or not given at all."""
    unfolded = Sae(SAE.W_enc, SAE.W_dec, SAE.b_enc + SAE.b_dec @ SAE.W_enc, SAE.b_dec, SAE.threshold)
    read = load_sae(saelens_folder(tmp_path, unfolded, apply_b_dec_to_input=flag))
    assert_close(read.encode(X), unfolded.encode(X - SAE.b_dec), rtol=1e-5, atol=1e-6)
    assert_close(read(X), SAE(X), rtol=1e-5, atol=1e-6)


def test_a_hub_id_is_downloaded_with_what_describes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gemma_scope.write(tmp_path / "layer_3/width_1k/average_l0_9", SAE)
    asked: list[tuple[str, list[str]]] = []

    def folder(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
    inside = "layer_3/width_1k/average_l0_9"
    for name in ("", "/params.npz"):
        assert_same(load_sae(f"google/gemma-scope-2b-pt-res/{inside}{name}"))
    (repo, patterns), (_, of_file) = asked
    assert repo == "google/gemma-scope-2b-pt-res"
    assert {f"{inside}/params.npz", f"{inside}/cfg.json", f"{inside}/config.json"} <= set(patterns) & {*of_file, *patterns}
    assert f"{inside}/params.npz" in of_file
    assert f"{inside}/sae_weights.safetensors" not in of_file


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


@pytest.mark.parametrize("changes", [{"architecture": "temporal"}, {"normalize_activations": "expected_average_only_in"}])
def test_another_kind_of_saelens_sae_is_refused(tmp_path: Path, changes: dict[str, str]):
    with pytest.raises(ConfigError, match="only standard, gated, jumprelu"):
        load_sae(saelens_folder(tmp_path, **changes))


def test_damaged_saelens_weights_are_refused(tmp_path: Path):
    saelens_folder(tmp_path)
    save_file({"W_enc": SAE.W_enc}, tmp_path / "sae_weights.safetensors")
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


def test_device_and_dtype_are_the_callers(tmp_path: Path):
    gemma_scope.write(tmp_path, SAE)
    for dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        sae = load_sae(tmp_path, dtype=dtype)
        assert sae.dtype == torch.bfloat16
        assert torch.equal(sae.W_enc, SAE.W_enc.bfloat16())
    assert load_sae(tmp_path, device="meta").device.type == "meta"
    with pytest.raises(ConfigError, match="dtype='int8'"):
        load_sae(tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="dtype='floaty'"):
        load_sae(tmp_path, dtype="floaty")
    with pytest.raises(ConfigError, match="device='gpu'") as caught:
        load_sae(tmp_path, device="gpu")
    assert "\n" not in str(caught.value)


def test_files_say_where_an_sae_sits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    site = Site("resid_post", 3)
    write_saelens(tmp_path / "suite", SAE, site, "tiny", {"scale": 2.0, "num_tokens": 7}, {"l0": 5.5})
    assert load_sae(tmp_path / "suite").metadata == SaeMetadata(site, "tiny", 5.5, 2.0, 7)
    write_sae(tmp_path / "run", SAE, {"site": "mlp_out", "layer": 1, "scale": 3.0, "num_tokens": 9})
    assert load_sae(tmp_path / "run").metadata == SaeMetadata(Site("mlp_out", 1), None, None, 3.0, 9)
    old = saelens_folder(tmp_path / "old", metadata={}, hook_name="blocks.5.attn.hook_z", model_name="gpt2-small")
    assert load_sae(old).metadata == SaeMetadata(Site("attn_out", 5), "gpt2-small")
    unknown = saelens_folder(tmp_path / "unknown", metadata={"hook_name": "blocks.5.attn.hook_q"})
    assert load_sae(unknown).metadata.site is None
    gemma_scope.write(tmp_path / "hub/layer_20/width_16k/average_l0_71", SAE)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    found = load_sae("google/gemma-scope-9b-it-att/layer_20/width_16k/average_l0_71").metadata
    assert found == SaeMetadata(Site("attn_out", 20), "google/gemma-2-9b-it", 71.0)
    assert load_sae("someone/gemma-scope-9b-it-att/layer_20/width_16k/average_l0_71").metadata == SaeMetadata()


@pytest.mark.parametrize(
    ("name", "public", "device", "found"),
    [
        ("owner/model", None, "cpu", "owner/model"),
        ("/data/mine", None, "cpu", "/data/mine"),
        ("/data/mine", "mine-7b", "cpu", "/data/mine"),
        ("/data/mine", None, "cuda:3", "/data/mine"),
        ("/data/other", "another", "cpu", None),
    ],
)
def test_the_model_of_a_suite_is_that_of_its_run_where_it_can_run(tmp_path, name, public, device, found, monkeypatch):
    """Whatever the suite calls it; of a run of another model only the suite's own name is left."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    called = public if public in ("mine-7b",) else ("owner/model" if "owner" in name else "mine")
    recipe = {"model": {"name": name, "device": device}, "public_model": public}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    model = model_of(tmp_path / "suite", called)
    assert (model.name, model.device) == (found or called, "cpu")
    (tmp_path / "recipe.json").write_text("{}")
    assert model_of(tmp_path / "suite", called).name == called
