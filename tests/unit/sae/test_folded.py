"""The finished SAE is a module of torch.nn that knows where it sits, and refuses what does not fit."""

import copy

import pytest
import torch

from everyscope.base.errors import DataError, NonFinite, ShapeMismatch
from everyscope.base.files import sha256
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import read_sae, write_sae
from everyscope.sae.folded import PARAMETERS, Sae, from_tensors, save_sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import fold, new_sae
from everyscope.sites.names import Site
from everyscope.suite.reader import load_sae


def some_sae() -> Sae:
    return fold(new_sae(SaeConfig(width=12, sparsity_coefficient=0), 5), Normalisation(2.0))


def test_wrong_d_in_is_one_clear_error():
    with pytest.raises(ShapeMismatch, match="d_in=7, the SAE expects 5"):
        some_sae()(torch.zeros(3, 7))


def test_tensors_that_do_not_fit_are_refused():
    tensors = some_sae().tensors()
    with pytest.raises(ShapeMismatch, match="b_enc"):
        from_tensors(tensors | {"b_enc": torch.zeros(3)})
    with pytest.raises(NonFinite, match="threshold"):
        from_tensors(tensors | {"threshold": torch.full((12,), torch.nan)})
    del tensors["W_dec"]
    with pytest.raises(ShapeMismatch, match="W_dec"):
        from_tensors(tensors)


def test_saved_and_read_back_is_the_same(tmp_path):
    sae = some_sae()
    write_sae(tmp_path / "a", sae, {"layer": 3})
    again, record = read_sae(tmp_path / "a")
    assert record == {"layer": 3, "weights_sha256": sha256(tmp_path / "a/sae.safetensors")}
    assert all(torch.equal(sae.tensors()[name], tensor) for name, tensor in again.tensors().items())
    with pytest.raises(DataError, match="no finished SAE"):
        read_sae(tmp_path / "b")


def test_reconstruction_keeps_the_dtype_of_the_activations():
    assert some_sae()(torch.zeros(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_another_device_is_one_clear_error():
    with pytest.raises(ShapeMismatch, match=r"activations are on cpu, the SAE on meta; move it: sae.to\('cpu'\)"):
        some_sae().to("meta").encode(torch.zeros(3, 5))


def test_it_moves_as_torch_modules_do():
    sae = some_sae()
    assert (sae.device, sae.dtype) == (torch.device("cpu"), torch.float32)
    assert sae.to("cpu", torch.float64) is sae
    assert sae.dtype == sae.encode(torch.zeros(2, 5)).dtype == torch.float64
    assert sae.to(dtype=torch.bfloat16).bfloat16().W_dec.dtype == torch.bfloat16
    assert sae.to("meta", torch.float32).device.type == "meta"


def test_it_is_a_module_among_modules():
    sae, other = some_sae(), some_sae()
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), sae)
    assert {f"1.{name}" for name in PARAMETERS} < set(model.state_dict())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.weight", "0.bias"]
    model(torch.ones(2, 3)).sum().backward()
    assert model[0].weight.grad is not None, "gradients pass through the frozen SAE"
    assert sae.W_enc.grad is None
    with torch.no_grad():
        other.W_enc.zero_()
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.W_enc, sae.W_enc)
    assert sae.W_enc is sae.W_enc
    assert sae.W_dec is sae.W_dec


def test_unfrozen_it_learns():
    sae = some_sae().requires_grad_()
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    sae(x).square().sum().backward()
    assert all(getattr(sae, name).grad.abs().sum() > 0 for name in ("W_enc", "W_dec", "b_enc", "b_dec"))


@pytest.mark.parametrize("site", [None, Site("attn_out", 1), Site("embed", 0)])
def test_what_is_saved_is_loaded_bit_for_bit_with_its_metadata(tmp_path, site):
    sae = some_sae()
    sae.metadata = SaeMetadata(site=site, model="tiny", l0=3.25, scale=2.0, num_tokens=640)
    sae.save(tmp_path / "a")
    save_sae(sae, str(tmp_path / "b"))
    for folder in ("a", "b"):
        again = load_sae(tmp_path / folder)
        assert again.metadata == sae.metadata
        assert all(torch.equal(getattr(again, name), getattr(sae, name)) for name in PARAMETERS)
    some_sae().save(tmp_path / "c")
    assert load_sae(tmp_path / "c").metadata == SaeMetadata()


def test_it_prints_as_one_line():
    sae = some_sae()
    assert repr(sae) == "Sae(d_in=5, d_sae=12)"
    sae.metadata = SaeMetadata(site=Site("resid_post", 2), model="tiny", l0=26.94)
    assert repr(copy.deepcopy(sae)) == "Sae(resid_post layer 2 of tiny: d_in=5, d_sae=12, L0=26.94)"
    assert repr(sae.to("meta", torch.bfloat16)).endswith("L0=26.94, torch.bfloat16, meta)")


def test_topk_keeps_the_largest_of_a_row():
    """Against a sort; nothing negative is kept, however few are positive, and thresholds still hold."""
    sae = some_sae()
    x = torch.randn(30, sae.d_in, generator=torch.Generator().manual_seed(1))
    wide = Sae(sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, sae.threshold, top_k=3)
    f, kept = sae.encode(x), wide.encode(x)
    least = f.sort(dim=1).values[:, [-3]]
    assert torch.equal(kept, torch.where(f >= least, f, 0))
    assert torch.equal(wide(x), wide.decode(kept))
    assert torch.equal(Sae(**sae.own_tensors(), top_k=sae.d_sae).encode(x), f)
    assert wide.with_tensors(b_dec=sae.b_dec + 1).top_k == 3
    assert "TopK 3" in repr(wide)
    with pytest.raises(ShapeMismatch, match=f"top_k=0 of {sae.d_sae} latents"):
        Sae(**sae.own_tensors(), top_k=0)
