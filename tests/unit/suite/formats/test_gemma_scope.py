"""params.npz of Gemma Scope 1: SAEs, transcoders, and our suites' transcoders with a skip."""

from pathlib import Path

import numpy as np
import pytest
from invented_coders import D_IN, D_OUT, X, arrays, assert_equal_coders, assert_reads_as, assert_refused, coder, jumprelu

from everyscope.base.errors import ConfigError
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.names import Site
from everyscope.suite.formats import gemma_scope
from everyscope.suite.reader import load_sae


def reference(a: dict) -> tuple:
    f = jumprelu(X @ a["W_enc"] + a["b_enc"], a["threshold"])
    return f, f @ a["W_dec"] + a["b_dec"] + (X @ a["W_skip"] if "W_skip" in a else 0)


@pytest.mark.parametrize("d_out", [D_IN, D_OUT])
@pytest.mark.parametrize("skip", [False, True])
def test_an_npz_is_what_its_formula_says(tmp_path: Path, d_out: int, skip: bool):
    a = {name: array for name, array in arrays(d_out).items() if skip or name != "W_skip"}
    np.savez(tmp_path / "params.npz", **a)
    found = assert_reads_as(tmp_path, *reference(a))
    assert found.is_transcoder == (skip or d_out != D_IN)


def test_a_released_transcoder_is_known_by_its_path(tmp_path: Path):
    folder = tmp_path / "models--google--gemma-scope-2b-pt-transcoders/snapshots/0af/layer_15/width_16k/average_l0_78"
    gemma_scope.write(folder, coder())
    found = load_sae(folder)
    known = SaeMetadata(Site("mlp_in", 15), "google/gemma-2-2b", 78.0, target=Site("mlp_out", 15), convention="normalised")
    assert found.metadata == known == load_sae(folder / "params.npz").metadata
    assert found.metadata.hook_in == "blocks.15.ln2.hook_normalized"


@pytest.mark.parametrize("skip", [False, True])
def test_a_round_trip_gives_the_same_bytes(tmp_path: Path, skip: bool):
    gemma_scope.write(tmp_path / "a", coder(skip=skip))
    gemma_scope.write(tmp_path / "b", load_sae(tmp_path / "a"))
    assert (tmp_path / "a/params.npz").read_bytes() == (tmp_path / "b/params.npz").read_bytes()
    assert_equal_coders(load_sae(tmp_path / "b"), coder(skip=skip))


def test_what_it_cannot_say_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot say TopK"):
        gemma_scope.write(tmp_path, coder(top_k=4))
    np.savez(tmp_path / "params.npz", **arrays(D_OUT) | {"W_skip": arrays(D_OUT)["W_skip"].T})
    assert_refused(tmp_path, r"params\.npz: W_skip has shape \(5, 6\), expected \(6, 5\).*transposed")
