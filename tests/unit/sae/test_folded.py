"""The finished SAE refuses what does not fit."""

import pytest
import torch

from everyscope.base.errors import DataError, NonFinite, ShapeMismatch
from everyscope.base.files import sha256
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import read_sae, save_sae
from everyscope.sae.folded import Sae, from_tensors
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import fold, new_sae


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
    save_sae(tmp_path / "a", sae, {"layer": 3})
    again, record = read_sae(tmp_path / "a")
    assert record == {"layer": 3, "weights_sha256": sha256(tmp_path / "a/sae.safetensors")}
    assert all(torch.equal(sae.tensors()[name], tensor) for name, tensor in again.tensors().items())
    with pytest.raises(DataError, match="no finished SAE"):
        read_sae(tmp_path / "b")


def test_reconstruction_keeps_the_dtype_of_the_activations():
    assert some_sae()(torch.zeros(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
