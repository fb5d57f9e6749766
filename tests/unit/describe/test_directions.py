import numpy as np
import pyarrow
import pytest
import torch

from everyscope.describe import directions
from everyscope.describe.columns import KEPT_BITS
from everyscope.describe.directions import logit_columns, neighbour_column
from everyscope.describe.lens import Lens
from everyscope.sae.folded import Sae
from everyscope.sites.logits import Gain, LogitPath

NEAR = 2.0**-KEPT_BITS


def sae_of(width: int, seed: int, d_in: int = 12) -> Sae:
    W_dec = torch.randn(width, d_in, generator=torch.Generator().manual_seed(seed)) * 3
    return Sae(W_dec.T.contiguous(), W_dec, torch.zeros(width), torch.zeros(d_in), torch.zeros(width))


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_neighbours_are_the_largest_cosines(chunk, monkeypatch):
    monkeypatch.setattr(directions, "CHUNK_NUMBERS", chunk)
    saes = {4: sae_of(20, 0), 7: sae_of(30, 1)}
    got = [
        row
        for first, last in ((0, 13), (13, 20))
        for row in neighbour_column(saes[4].W_dec[first:last], first, ((0, 4), (1, 7)), saes, 8).to_pylist()
    ]
    own, other = (torch.nn.functional.normalize(saes[number].W_dec.double(), dim=1) for number in (4, 7))
    for latent, row in enumerate(got):
        same, wider = own[latent] @ own.T, own[latent] @ other.T
        same[latent] = -torch.inf
        for relation, number, cosine in ((0, 4, same), (1, 7, wider)):
            its = [entry for entry in row if entry["relation"] == relation]
            want = cosine.argsort(descending=True)[:8].tolist()
            assert [(entry["sae"], entry["latent"]) for entry in its] == [(number, neighbour) for neighbour in want]
            assert [entry["cosine"] for entry in its] == pytest.approx(cosine[want].tolist(), rel=NEAR, abs=1e-6)


def test_small_saes_have_fewer_neighbours_and_none_of_themselves():
    sae = sae_of(3, 0)
    (row, *_) = neighbour_column(sae.W_dec, 0, ((0, 0),), {0: sae}, 8).to_pylist()
    assert {entry["latent"] for entry in row} == {1, 2}
    none = neighbour_column(sae.W_dec, 0, ((0, 0),), {0: sae}, 0)
    assert none.to_pylist() == [[], [], []]


def test_logits_are_the_ends_of_the_path_and_padding_is_no_token():
    generator = torch.Generator().manual_seed(0)
    unembedding, gain = torch.randn(50, 12, generator=generator), torch.randn(12, generator=generator)
    unembedding[40:] *= 100  # rows behind the tokenizer's last token
    path, lens = LogitPath(None, None, Gain(gain, False), unembedding, "", None), Lens(unembedding, 40)
    W_dec = sae_of(9, 2).W_dec
    found = {name: column.to_pylist() for name, column in logit_columns(path, lens, W_dec, has_raw=True).items()}
    for prefix, logits in (("", (W_dec * gain) @ unembedding.T), ("raw_", W_dec @ unembedding.T)):
        for end, sign in (("top", -1), ("bottom", 1)):
            for row, values in zip(found[f"{prefix}{end}_logits"], logits[:, :40].numpy(), strict=True):
                want = np.argsort(sign * values)[:10]
                assert [entry["token"] for entry in row] == want.tolist()
                assert [entry["value"] for entry in row] == pytest.approx(values[want].tolist(), rel=2 * NEAR)
    without = logit_columns(path, lens, W_dec, has_raw=False)
    assert without["top_logits"].equals(logit_columns(path, lens, W_dec, has_raw=True)["top_logits"])
    assert without["raw_top_logits"].to_pylist() == without["raw_bottom_logits"].to_pylist() == [[]] * 9


def test_columns_have_the_types_of_the_format():
    sae = sae_of(3, 0)
    column = neighbour_column(sae.W_dec, 0, ((0, 0),), {0: sae}, 8)
    assert column.type.value_type.field("relation").type == pyarrow.int8()
