"""Transcoders, folded: what they compute, what they are saved as, and the two forms of their input."""

import pytest
import torch
from safetensors.torch import load_file

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import read_object, write_json
from everyscope.sae.conventions import to_convention
from everyscope.sae.files import read_sae, write_sae
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.reader import load_sae

D_IN, D_SAE, D_OUT = 6, 20, 9
AT_MLP = SaeMetadata(Site("mlp_in", 3), "tiny", target=Site("mlp_out", 3), convention="mlp_input")


def some_transcoder(*, has_skip: bool = True, d_out: int = D_OUT, metadata: SaeMetadata = AT_MLP) -> Sae:
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    tensors = (draw(D_IN, D_SAE), draw(D_SAE, d_out), draw(D_SAE), draw(d_out), draw(D_SAE).abs())
    return Sae(*tensors, draw(D_IN, d_out) if has_skip else None, metadata=metadata)


def rows(count: int = 50) -> torch.Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("has_skip", [False, True])
def test_it_computes_what_it_says(has_skip):
    coder, x = some_transcoder(has_skip=has_skip), rows()
    pre = x @ coder.W_enc + coder.b_enc
    f = torch.where((pre > coder.threshold) & (pre > 0), pre, 0)
    want = f @ coder.W_dec + coder.b_dec + (0 if coder.W_skip is None else x @ coder.W_skip)
    torch.testing.assert_close(coder(x), want)
    torch.testing.assert_close(coder.encode(x), f)
    assert (coder.d_in, coder.d_sae, coder.d_out, coder.is_transcoder) == (D_IN, D_SAE, D_OUT, True)
    assert coder.metadata.coder_site == Site("transcoder", 3)


def test_a_skip_needs_what_it_skips_from():
    coder, x = some_transcoder(), rows()
    with pytest.raises(ConfigError, match=r"decode\(f, x\)"):
        coder.decode(coder.encode(x))
    plain = some_transcoder(has_skip=False)
    assert torch.equal(plain.decode(plain.encode(x)), plain(x))


def test_tensors_that_do_not_fit_are_refused():
    tensors = some_transcoder().tensors()
    with pytest.raises(ShapeMismatch, match="W_skip"):
        from_tensors(tensors | {"W_skip": tensors["W_skip"].T.contiguous()}, AT_MLP)
    with pytest.raises(ShapeMismatch, match="b_dec"):
        from_tensors(tensors | {"b_dec": torch.zeros(D_IN)}, AT_MLP)
    with pytest.raises(ShapeMismatch, match="only transcoders"):
        from_tensors(tensors)
    del tensors["W_skip"]
    with pytest.raises(ShapeMismatch, match="W_dec"):
        from_tensors(tensors)  # an SAE writes what it reads


@pytest.mark.parametrize("has_skip", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, has_skip):
    coder = some_transcoder(has_skip=has_skip)
    coder.save(tmp_path / "saelens")
    again = load_sae(tmp_path / "saelens")
    assert again.metadata == coder.metadata
    assert all(torch.equal(again.own_tensors()[name], tensor) for name, tensor in coder.own_tensors().items())
    record = {"site": "transcoder", "layer": 3, "reads": "mlp_in/layer_3", "model": "tiny"}
    write_sae(tmp_path / "ours", coder, record)
    assert read_sae(tmp_path / "ours")[0].metadata == coder.metadata
    assert torch.equal(load_sae(tmp_path / "ours")(rows()), coder(rows()))
    assert repr(coder).startswith("Transcoder(transcoder layer 3 of tiny: d_in=6, d_out=9, d_sae=20")


def test_saelens_keeps_the_skip_transposed(tmp_path):
    coder = some_transcoder()
    coder.save(tmp_path)
    config, tensors = read_object(tmp_path / "cfg.json"), load_file(tmp_path / "sae_weights.safetensors")
    assert config["architecture"] == "jumprelu_skip_transcoder"
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (D_IN, D_OUT, False)
    assert config["metadata"]["hook_name"] == "blocks.3.mlp.hook_in"
    assert config["metadata"]["hook_name_out"] == "blocks.3.hook_mlp_out"
    assert torch.equal(tensors["W_skip"], coder.tensors()["W_skip"].T)
    write_json(tmp_path / "cfg.json", config | {"apply_b_dec_to_input": True})
    with pytest.raises(ConfigError, match="apply_b_dec_to_input"):
        load_sae(tmp_path)
    write_json(tmp_path / "cfg.json", config | {"architecture": "jumprelu_transcoder"})
    with pytest.raises(ConfigError, match="W_skip is not 0"):
        load_sae(tmp_path)
    plain = some_transcoder(has_skip=False)
    plain.save(tmp_path)
    write_json(tmp_path / "cfg.json", read_object(tmp_path / "cfg.json") | {"architecture": "jumprelu_skip_transcoder"})
    with pytest.raises(ShapeMismatch, match="has no tensor W_skip"):
        load_sae(tmp_path)


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_forms_of_the_input_give_equal_outputs(has_skip, has_bias):
    g = torch.Generator().manual_seed(2)
    gain, bias = torch.randn(D_IN, generator=g) + 0.1, torch.randn(D_IN, generator=g) if has_bias else None
    coder, normalised = some_transcoder(has_skip=has_skip).double(), rows(400).double()
    with_gain = normalised * gain + (0 if bias is None else bias)
    other = to_convention(coder, "normalised", gain, bias)
    assert other.metadata.hook_in == "blocks.3.ln2.hook_normalized"
    torch.testing.assert_close(other(normalised), coder(with_gain), rtol=1e-12, atol=1e-12)
    back = to_convention(other, "mlp_input", gain, bias)
    assert back.metadata == coder.metadata
    torch.testing.assert_close(back(with_gain), coder(with_gain), rtol=1e-12, atol=1e-12)
    single, x = to_convention(some_transcoder(has_skip=has_skip), "normalised", gain, bias), normalised.float()
    error = (single(x) - coder(with_gain)).norm() / coder(with_gain).norm()
    assert error < 1e-6


def test_what_does_not_convert_is_refused():
    coder, ones = some_transcoder(), torch.ones(D_IN)
    with pytest.raises(ConfigError, match="'residual'"):
        to_convention(coder, "residual", ones)
    with pytest.raises(ShapeMismatch, match="gain"):
        to_convention(coder, "normalised", torch.ones(D_OUT))
    normalised = to_convention(coder, "normalised", ones.clone().index_fill_(0, torch.tensor([2]), 0))
    with pytest.raises(ConfigError, match="gain is 0"):
        to_convention(normalised, "mlp_input", ones.clone().index_fill_(0, torch.tensor([2]), 0))
    assert to_convention(coder, "mlp_input", ones) is coder
