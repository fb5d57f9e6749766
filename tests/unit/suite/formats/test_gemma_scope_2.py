"""config.json and params.safetensors of Gemma Scope 2: SAEs and (skip) transcoders of one layer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from invented_coders import D_OUT, TRANSCODER, X, arrays, assert_equal_coders, assert_reads_as, assert_refused, coder, jumprelu
from safetensors.numpy import load_file, save_file

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.sae.conventions import to_convention
from everyscope.sites.names import Site
from everyscope.suite.formats import gemma_scope_2
from everyscope.suite.reader import load_sae

LAYER = "model.layers.12"
OUT = f"{LAYER}.post_feedforward_layernorm.output"
IN = {
    "resid_post": f"{LAYER}.output",
    "attn_out": f"{LAYER}.self_attn.o_proj.input",
    "mlp_out": OUT,
    "mlp_in": f"{LAYER}.pre_feedforward_layernorm.output",
}


def folder_of(path: Path, a: dict, **config) -> Path:
    """As DeepMind writes it."""
    path.mkdir(parents=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "W_skip": "affine_skip_connection"}
    save_file({names.get(name, name): array for name, array in a.items()}, path / "params.safetensors")
    said = {"hf_hook_point_in": IN["mlp_in"], "hf_hook_point_out": OUT, "width": 40, "model_name": "google/gemma-3-1b-pt"}
    said |= {"architecture": "jump_relu", "l0": 100, "affine_connection": "W_skip" in a, "type": "transcoder"}
    (path / "config.json").write_text(json.dumps(said | config))
    return path


def reference(a: dict) -> tuple:
    f = jumprelu(X @ a["W_enc"] + a["b_enc"], a["threshold"])
    return f, f @ a["W_dec"] + a["b_dec"] + (X @ a["W_skip"] if "W_skip" in a else 0)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_what_its_formula_says(tmp_path: Path, skip: bool):
    """The skip is not transposed: with d_out = d_in its transpose would fit, and give something else."""
    a = {name: array for name, array in arrays().items() if skip or name != "W_skip"}
    found = assert_reads_as(folder_of(tmp_path / "a", a), *reference(a))
    known = found.metadata
    assert (known.site, known.target, known.convention) == (Site("mlp_in", 12), Site("mlp_out", 12), "mlp_input")
    assert (known.model, known.l0, known.coder_site) == ("google/gemma-3-1b-pt", 100.0, Site("transcoder", 12))
    if skip:
        transposed = a | {"W_skip": np.ascontiguousarray(a["W_skip"].T)}
        assert not torch.allclose(
            load_sae(folder_of(tmp_path / "b", transposed))(torch.from_numpy(X)), found(torch.from_numpy(X))
        )


@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out"])
def test_an_sae_is_read_at_its_site(tmp_path: Path, kind: str):
    a = {name: array for name, array in arrays().items() if name != "W_skip"}
    said = {"hf_hook_point_in": IN[kind], "hf_hook_point_out": IN[kind], "type": "sae"}
    found = assert_reads_as(folder_of(tmp_path / "a", a, **said), *reference(a))
    assert found.metadata.site == Site(kind, 12)
    assert not found.is_transcoder


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gemma-v3-270m-pt", "google/gemma-3-270m"),
        ("google/gemma-3-270m-it", "google/gemma-3-270m-it"),
        ("gemma-3-4b-pt", "google/gemma-3-4b-pt"),
        (None, None),
    ],
)
def test_models_are_called_as_on_the_hub(tmp_path: Path, name: str | None, wanted: str | None):
    a = {key: array for key, array in arrays().items() if key != "W_skip"}
    assert load_sae(folder_of(tmp_path / "a", a, model_name=name)).metadata.model == wanted


@pytest.mark.parametrize(("d_out", "skip"), [(6, False), (6, True), (D_OUT, True), (D_OUT, False)])
def test_a_round_trip_gives_the_same_bytes(tmp_path: Path, d_out: int, skip: bool):
    wanted = coder(d_out, skip=skip)
    gemma_scope_2.write(tmp_path / "a", wanted)
    gemma_scope_2.write(tmp_path / "b", load_sae(tmp_path / "a"))
    for name in ("config.json", "params.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert_equal_coders(load_sae(tmp_path / "b"), wanted)


def test_files_hold_the_names_that_the_release_has(tmp_path: Path):
    """Spelt in capitals, so that no renaming of ours across the repository changes reader, writer and test alike."""
    gemma_scope_2.write(tmp_path, coder(skip=True))
    wanted = ("W_ENC", "W_DEC", "B_ENC", "B_DEC", "THRESHOLD", "AFFINE_SKIP_CONNECTION")
    assert set(load_file(tmp_path / "params.safetensors")) == {name.lower() for name in wanted}
    said = ("HF_HOOK_POINT_IN", "HF_HOOK_POINT_OUT", "WIDTH", "MODEL_NAME", "ARCHITECTURE", "L0", "AFFINE_CONNECTION", "TYPE")
    assert set(json.loads((tmp_path / "config.json").read_text())) == {name.lower() for name in said}


def test_another_input_is_refused_until_it_is_converted(tmp_path: Path):
    """Gemma Scope 1's transcoders take the input without the norm's gain, Gemma Scope 2's with it."""
    gain = torch.linspace(0.5, 2, 6)
    without = to_convention(coder(skip=True, metadata=TRANSCODER), "normalised", gain)
    with pytest.raises(ConfigError, match="take mlp_input, this one normalised"):
        gemma_scope_2.write(tmp_path, without)
    gemma_scope_2.write(tmp_path, to_convention(without, "mlp_input", gain))
    x = torch.from_numpy(X)
    torch.testing.assert_close(load_sae(tmp_path)(x), without(x / gain), rtol=1e-5, atol=1e-5)


def test_what_is_not_of_one_layer_is_refused(tmp_path: Path):
    a = arrays()
    for kind in ("clt", "crosscoder"):
        assert_refused(folder_of(tmp_path / kind, a, type=kind), f"type='{kind}' reads or writes several layers", ConfigError)
    assert_refused(folder_of(tmp_path / "b", a, architecture="topk"), "expected jump_relu", ConfigError)
    assert_refused(folder_of(tmp_path / "c", a, affine_connection=False), "are they of two coders", ShapeMismatch)
    del a["W_skip"]
    assert_refused(folder_of(tmp_path / "d", a, affine_connection=True), "has no affine_skip_connection", ShapeMismatch)
    del a["b_dec"]
    assert_refused(folder_of(tmp_path / "e", a), "has no tensor b_dec; a Gemma Scope 2 file has", ShapeMismatch)
