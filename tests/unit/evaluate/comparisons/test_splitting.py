import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from small_scope import tree_bytes

from everyscope.evaluate.comparisons import canonical, splitting, widths
from everyscope.evaluate.comparisons.config import SplittingConfig, WidthsConfig
from everyscope.evaluate.comparisons.scored import read_scored
from everyscope.evaluate.comparisons.splitting import FiringCounts, RowCodes, codes_of
from everyscope.evaluate.config import EvaluateConfig


def settings(config: EvaluateConfig, **changes) -> SplittingConfig:
    return SplittingConfig(evaluate=config, canonical_l0=6, num_sequences=8, null_latents=500, **changes)


def codes(f: torch.Tensor) -> RowCodes:
    row, latent = (f > 0).nonzero(as_tuple=True)
    return RowCodes(len(f), row, latent, f[row, latent].float())


def test_firings_are_those_of_dense_codes():
    generator = torch.Generator().manual_seed(0)
    parent = torch.tensor([2, 0, 0, 1, 2, 2])
    firings, narrow_all, wide_all = FiringCounts(parent, 4), [], []
    for rows in (30, 1, 0, 17):
        narrow = (torch.rand(rows, 4, generator=generator) < 0.4).float()
        wide = (torch.rand(rows, 6, generator=generator) < 0.3).float()
        firings.update(codes(narrow), codes(wide))
        narrow_all.append(narrow)
        wide_all.append(wide)
    firings.update(codes(torch.zeros(5, 4)), codes(torch.ones(5, 6)))
    narrow, wide = torch.cat([*narrow_all, torch.zeros(5, 4)]), torch.cat([*wide_all, torch.ones(5, 6)])
    assert firings.narrow.tolist() == narrow.sum(0).tolist()
    assert firings.wide.tolist() == wide.sum(0).tolist()
    assert firings.both.tolist() == (narrow[:, parent] * wide).sum(0).tolist()


def test_canonical_saes_are_the_nearest_ones(suite: EvaluateConfig):
    scored = read_scored(suite)
    for wanted in (0.1, 3, 6, 1000):
        for (site, width), one in canonical.canonical_saes(scored, wanted).items():
            others = [its for its in scored if (its.site, its.width) == (site, width)]
            assert abs(one.l0 - wanted) == min(abs(its.l0 - wanted) for its in others)
    of_sites = canonical.canonical_of_sites(scored, 6)
    assert [(one.site, one.width) for one in of_sites] == [(site, 16) for site in sorted({one.site for one in scored})]


def test_pairs_are_of_one_site_adjacent_widths_and_nearest_l0(suite: EvaluateConfig):
    scored = read_scored(suite)
    pairs = splitting.width_pairs(settings(suite))
    assert [(pair.narrow.width, pair.wide.width) for pair in pairs] == [(16, 48)] * 2
    for pair in pairs:
        assert pair.narrow.site == pair.wide.site
        rivals = [one for one in scored if (one.site, one.width) == (pair.wide.site, 48)]
        assert abs(pair.wide.l0 - pair.narrow.l0) == min(abs(one.l0 - pair.narrow.l0) for one in rivals)


def test_the_table_says_what_decoders_and_codes_say(scratch: EvaluateConfig):
    config = settings(scratch)
    content = json.loads(splitting.run(config).read_text())
    pair, row = splitting.width_pairs(config)[0], content["pairs"][0]
    table = pyarrow.parquet.read_table(config.slices / row["table"])
    assert table.schema.names == ["narrow", "wide", "cosine", "null_p", "cofiring", "conditional", "relation"]
    assert [str(kind) for kind in table.schema.types] == ["int32", "int32", *["float"] * 4, "string"]
    assert (row["narrow"], row["wide"], row["site"]) == (pair.narrow.name, pair.wide.name, pair.narrow.site.folder)
    narrow, wide = (torch.nn.functional.normalize(one.target.sae().W_dec, dim=1) for one in (pair.narrow, pair.wide))
    cosines = wide @ narrow.T
    columns = table.to_pydict()
    assert columns["wide"] == list(range(48))
    np.testing.assert_allclose(columns["cosine"], cosines.max(1).values, atol=1e-6)
    assert columns["narrow"] == cosines.argmax(1).tolist()
    for name in ("matched", "split", "new"):
        assert row[name] == columns["relation"].count(name) / 48
    assert sum(row["null"].values()) == pytest.approx(1)
    fires = {}
    for one in (pair.narrow, pair.wide):
        dense = torch.zeros(0, one.width, dtype=torch.bool)
        for batch in codes_of(scratch, [one.target], 8):
            its = batch[one.target.identity]
            f = torch.zeros(its.num_rows, one.width, dtype=torch.bool)
            f[its.row, its.latent] = True
            dense = torch.cat([dense, f])
        fires[one.name] = dense
    n, w = fires[pair.narrow.name], fires[pair.wide.name]
    for latent in range(48):
        parent = columns["narrow"][latent]
        both = int((n[:, parent] & w[:, latent]).sum())
        for name, fired in (("cofiring", n[:, parent]), ("conditional", w[:, latent])):
            want = both / int(fired.sum()) if fired.any() else None
            assert columns[name][latent] == (None if want is None else pytest.approx(want, rel=1e-6))


def test_it_is_made_once_and_what_is_lost_is_made_again(scratch: EvaluateConfig, monkeypatch: pytest.MonkeyPatch):
    path = splitting.run(settings(scratch))
    before = tree_bytes(scratch.out)
    tables = sorted((scratch.out / "slices/splitting").rglob("*.parquet"))
    assert len(tables) == 2
    tables[0].unlink()
    made = []
    compare = splitting.decoder_match
    monkeypatch.setattr(splitting, "decoder_match", lambda *arguments: made.append(1) or compare(*arguments))
    splitting.run(settings(scratch))
    assert len(made) == 1
    assert tree_bytes(scratch.out) == before
    monkeypatch.setattr(splitting, "codes_of", lambda *_: pytest.fail("there was nothing to do"))
    assert splitting.run(settings(scratch)) == path
    with pytest.raises(BaseException, match="nothing to do"):
        splitting.run(settings(scratch, seed=1))


def test_groups_of_pairs_change_nothing(scratch: EvaluateConfig):
    splitting.run(settings(scratch))
    before = tree_bytes(scratch.out)
    for path in (scratch.out / "slices").rglob("*.*"):
        path.unlink()
    splitting.run(settings(scratch, pairs_at_once=1))
    assert tree_bytes(scratch.out) == before


def test_of_one_width_alone_the_comparison_is_left_out(scratch: EvaluateConfig, capsys: pytest.CaptureFixture[str]):
    """A run goes on without it: all has been trained by then."""
    narrow = tuple(one.name for one in read_scored(scratch) if one.width == 16)
    config = settings(scratch.model_copy(update={"saes": narrow}))
    path = splitting.run(settings(scratch))
    assert path.exists()
    assert splitting.run(config) == path
    assert not path.exists()
    assert "left out: no site has SAEs of two widths" in capsys.readouterr().err
    # Of each width one SAE, of the lowest L0 and the highest: their curves do not meet.
    scored = read_scored(scratch)
    wide = {one.site for one in scored if one.width == 48}
    narrowest = min((one for one in scored if one.width == 16 and one.site in wide), key=lambda one: one.l0)
    widest = max((one for one in scored if one.width == 48 and one.site == narrowest.site), key=lambda one: one.l0)
    assert narrowest.l0 < widest.l0
    alone = scratch.model_copy(update={"saes": (narrowest.name, widest.name)})
    assert not widths.run(WidthsConfig(evaluate=alone, canonical_l0=10)).exists()
    assert "left out: no site has SAEs of two widths that meet" in capsys.readouterr().err
