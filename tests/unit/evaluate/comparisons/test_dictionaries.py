"""Splits that were planted are found, what is random is not, and chunks change nothing."""

import pytest
import torch
from torch.testing import assert_close

from everyscope.evaluate.comparisons import dictionaries
from everyscope.evaluate.comparisons.config import SplittingConfig
from everyscope.evaluate.comparisons.dictionaries import (
    MATCHED,
    NEW,
    SPLIT,
    nearest,
    normalised_rows,
    null_nearest,
    p_values,
    random_directions,
    relations,
    shares,
)
from everyscope.evaluate.comparisons.splitting import decoder_match

D_IN, NARROW, WIDE = 64, 80, 160
NULLS = ["isotropic", "covariance"]


def directions(num: int, seed: int) -> torch.Tensor:
    return normalised_rows(torch.randn(num, D_IN, generator=torch.Generator().manual_seed(seed)))


def settings(null: str) -> SplittingConfig:
    return SplittingConfig.model_construct(null=null, null_quantile=0.999, null_latents=4000, seed=0)


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """Narrow latent 7 becomes three, 0 to 19 but it stay as they are, all else in the wide dictionary is random."""
    narrow, wide = directions(NARROW, 1), directions(WIDE, 2)
    wide[:20] = narrow[:20]
    wide[7] = directions(1, 5)[0]
    clones = narrow[7] + 0.05 * torch.randn(3, D_IN, generator=torch.Generator().manual_seed(3))
    wide[100:103] = normalised_rows(clones)
    return narrow, wide


@pytest.mark.parametrize("null", NULLS)
def test_a_planted_split_is_found(null: str):
    kin = decoder_match(*planted(), settings(null))
    assert kin.parent[100:103].tolist() == [7, 7, 7]
    assert kin.relation[100:103] == [SPLIT] * 3
    kept = [latent for latent in range(20) if latent != 7]
    assert [kin.relation[latent] for latent in kept] == [MATCHED] * 19
    assert kin.parent[kept].tolist() == kept
    others = kin.relation[20:100] + kin.relation[103:]
    assert others.count(SPLIT) == 0
    assert others.count(NEW) >= len(others) - 2
    assert kin.null_p[100:103].max() <= 1 / 4000


@pytest.mark.parametrize("null", NULLS)
def test_a_random_dictionary_finds_none(null: str):
    kin = decoder_match(directions(NARROW, 1), directions(WIDE, 2), settings(null))
    assert shares(kin.relation)[SPLIT] == 0
    assert shares(kin.relation)[MATCHED] <= 2 / WIDE
    assert kin.null[NEW] >= 1 - 2 / WIDE
    # p-values of what is random are even: their mean is 1/2 within four standard errors
    assert abs(float(kin.null_p.mean()) - 0.5) < 4 * (1 / 12 / WIDE) ** 0.5


def test_decoders_in_few_dimensions_are_near_by_chance_and_only_the_covariance_knows():
    flat = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(8))
    narrow = torch.randn(NARROW, 4, generator=torch.Generator().manual_seed(6)) @ flat
    wide = torch.randn(WIDE, 4, generator=torch.Generator().manual_seed(7)) @ flat
    assert shares(decoder_match(narrow, wide, settings("isotropic")).relation)[NEW] == 0
    assert shares(decoder_match(narrow, wide, settings("covariance")).relation)[NEW] > 0.98


def test_scale_does_not_matter():
    narrow, wide = planted()
    lengths = torch.rand(WIDE, 1, generator=torch.Generator().manual_seed(4)) + 0.5
    one, other = (
        decoder_match(narrow, wide, settings("covariance")),
        decoder_match(3 * narrow, wide * lengths, settings("covariance")),
    )
    assert one.relation == other.relation
    assert_close(one.cosine, other.cosine)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    narrow, wide = planted()
    want = nearest(narrow, wide)
    full = wide @ narrow.T
    assert_close(want[1], full.max(1).values)
    monkeypatch.setattr(dictionaries, "CHUNK_COSINES", 3 * NARROW)
    got = nearest(narrow, wide)
    assert got[0].tolist() == want[0].tolist()
    assert_close(got[1], want[1])


def test_the_null_has_the_moments_it_claims():
    like = torch.randn(500, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1, 1, 1, 0.1])
    draws = random_directions(normalised_rows(like), "covariance")(20_000, torch.Generator().manual_seed(1))
    assert_close(draws.norm(dim=1), torch.ones(20_000))
    assert draws.square().mean(0)[0] > 2 * draws.square().mean(0)[1] > 2 * draws.square().mean(0)[4]
    isotropic = random_directions(normalised_rows(like), "isotropic")(20_000, torch.Generator().manual_seed(1))
    assert_close(isotropic.square().mean(0), torch.full((5,), 0.2), atol=0.01, rtol=0)


def test_the_null_is_a_function_of_its_seed():
    narrow, wide = planted()
    one, again, other = (null_nearest(narrow, wide, 50, "covariance", seed)[1] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_p_values_count_what_is_as_near():
    null = torch.tensor([0.3, 0.1, 0.2, 0.2])
    assert_close(p_values(torch.tensor([0.0, 0.2, 0.25, 0.4]), null), torch.tensor([5, 4, 2, 1], dtype=torch.float64) / 5)


def test_relations_by_hand():
    parent, cosine = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0.9, 0.8, 0.7, 0.9, 0.1])
    assert relations(parent, cosine, 0.5) == [MATCHED, SPLIT, SPLIT, MATCHED, NEW]
    assert shares(relations(parent, cosine, 0.5)) == {MATCHED: 0.4, SPLIT: 0.4, NEW: 0.2}
