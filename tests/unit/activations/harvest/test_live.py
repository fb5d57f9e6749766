"""A live harvest gives the bits that a harvest writes, bucket by bucket, as often as it is asked."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from everyscope.activations.harvest import bucket_index
from everyscope.activations.harvest.bucket_index import LIVE_FILE
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.live import LiveHarvest
from everyscope.activations.harvest.model_handle import ModelHandle
from everyscope.activations.harvest.run import run
from everyscope.activations.shards.bits import carrier_of
from everyscope.activations.shards.reader import Shards
from everyscope.base.errors import ConfigError, NonFinite, TextError
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.blocks import read_blocks
from everyscope.text.config import TextConfig
from tests.unit.activations.harvest.conftest import WIDTHS

Opened = Callable[..., LiveHarvest]


@pytest.fixture
def live(config, tokenizer, model) -> Opened:
    """A live harvest with the stand-in: `live()`, with fields of the config to change as keywords."""

    def open_it(identity: str = "stand-in", **changes) -> LiveHarvest:
        changed = HarvestConfig.model_validate({**dict(config), "out": config.out.parent / "live", **changes})
        return LiveHarvest(
            changed, identity, lambda config: ModelHandle({s: WIDTHS[s] for s in config.sites}, tokenizer, model.open)
        )

    return open_it


@pytest.fixture
def count_blocks(monkeypatch) -> list[int]:
    """Counts the blocks that are read from the text; the list holds one number."""
    count = [0]

    def counted(*args):
        for block in read_blocks(*args):
            count[0] += 1
            yield block

    monkeypatch.setattr("everyscope.activations.harvest.buckets.read_blocks", counted)
    return count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("bucket_rows", "num_tokens"), [(500, 10**6), (170, 1234), (10**6, 10**6)])
def test_buckets_are_the_shards_of_a_harvest(reap, live, config, dtype, bucket_rows, num_tokens):
    changes = {"dtype": dtype, "bucket_rows": bucket_rows, "num_tokens": num_tokens}
    folders = reap(config, **changes).folders
    buckets = live(**changes)
    for site, folder in folders.items():
        shards = Shards(folder)
        assert buckets.borders == np.cumsum([0, *(shard.rows for shard in shards.manifest.shards)]).tolist()
        assert buckets.widths[site.folder] == shards.d_in
        for number, (start, stop) in enumerate(zip(buckets.borders, buckets.borders[1:], strict=False)):
            assert np.array_equal(buckets.rows(number)[site.folder], carrier_of(shards.rows(start, stop)))


def test_a_real_model_gives_the_same_bits_live(tiny_random_model_folder, corpus, tmp_path):
    sites = (Site("attn_out", 0), Site("resid_post", 1))
    for dtype in ("float32", "bfloat16"):
        config = HarvestConfig(
            model=ModelConfig(name=str(tiny_random_model_folder)),
            text=TextConfig(source="files", paths=(corpus,), context=32, held_out_fraction=0.2),
            sites=sites,
            num_tokens=700,
            bucket_rows=300,
            batch_blocks=3,
            dtype=dtype,
            out=tmp_path / dtype,
        )
        folders = run(config).folders
        buckets = LiveHarvest(config.model_copy(update={"out": tmp_path / f"live_{dtype}"}))
        for site in sites:
            made = np.concatenate([buckets.rows(number)[site.folder] for number in range(len(buckets.borders) - 1)])
            shards = Shards(folders[site])
            assert np.array_equal(made, carrier_of(shards.rows(0, shards.num_rows)))
            assert buckets.statistics[site.folder].scale == pytest.approx(shards.statistics.scale, rel=0.1)


def test_a_bucket_made_again_in_any_order_is_the_same(live):
    buckets = live(bucket_rows=200)
    last = len(buckets.borders) - 2
    first = [buckets.rows(number) for number in range(last + 1)]
    for number in (last, 0, 1, 1, last, 3, 2, 0):
        again = buckets.rows(number)
        assert all(np.array_equal(again[site], rows) for site, rows in first[number].items())


def scales_of(buckets: LiveHarvest) -> dict[str, float]:
    return {site: statistics.scale for site, statistics in buckets.statistics.items()}


def test_the_text_is_read_ahead_once_and_the_statistics_are_made_once(live, model, count_blocks):
    first = live()
    scales = scales_of(first)
    (blocks,), passes = count_blocks, model.passes
    assert passes > 0
    assert model.loads == 1
    second = live()
    assert count_blocks == [blocks], "the text was read again"
    assert (second.identity, second.borders, scales_of(second)) == (first.identity, first.borders, scales)
    assert (count_blocks, model.passes, model.loads) == ([blocks], passes, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_the_first_bucket_as_it_is_sent(live, dtype):
    buckets = live(dtype=dtype)
    for site, rows in buckets.rows(0).items():
        stored = torch.from_numpy(rows) if dtype == "float32" else torch.from_numpy(rows).view(torch.bfloat16)
        squares = stored.double().square().sum(1)
        statistics = buckets.statistics[site]
        assert statistics.scale == pytest.approx(squares.mean().sqrt().item(), rel=1e-12)
        np.testing.assert_allclose(statistics.mean, stored.double().mean(0), rtol=1e-12)
        assert sorted(square for square, *_ in statistics.norms.largest) == pytest.approx(squares.sort().values[-16:].tolist())


@pytest.mark.parametrize("died_at", [3, 4, 7])
def test_reading_ahead_goes_on_where_it_was_killed(live, monkeypatch, count_blocks, died_at):
    monkeypatch.setattr(bucket_index, "SAVED_BUCKETS", 2)
    whole = live(bucket_rows=150, out=live().config.out / "whole")
    count_blocks[0] = 0
    record = bucket_index.record_of
    seen = []

    def dying(bucket):
        if len(seen) == died_at:
            raise KeyboardInterrupt
        seen.append(bucket)
        return record(bucket)

    with monkeypatch.context() as patch:
        patch.setattr(bucket_index, "record_of", dying)
        with pytest.raises(KeyboardInterrupt):
            live(bucket_rows=150)
    read_before, count_blocks[0] = count_blocks[0], 0
    resumed = live(bucket_rows=150)
    total = sum(1 for _ in read_blocks(resumed.config.text, resumed._handle.tokenizer, "train"))
    saved = resumed._places[died_at // 2 * 2].blocks
    assert count_blocks == [total - saved]
    assert read_before > saved > 0
    assert (resumed.identity, resumed.borders) == (whole.identity, whole.borders)


def damage(text: str, how: str) -> str:
    value = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2]
    if how == "no JSON object":
        return "[1, NaN]"
    if how == "a border moved":
        value["buckets"][1]["after"]["rows"] += 1
    if how == "a scale changed":
        value["statistics"][next(iter(value["statistics"]))]["mean_squared_norm"] *= 2
    if how == "a field more":
        value["more"] = 1
    return json.dumps(value)


@pytest.mark.parametrize("how", ["cut", "no JSON object", "a border moved", "a scale changed", "a field more"])
def test_a_damaged_file_is_made_anew(live, how):
    before = live()
    scales, file = scales_of(before), before.config.out / LIVE_FILE
    whole = file.read_text()
    file.write_text(damage(whole, how))
    after = live()
    assert (after.identity, after.borders, scales_of(after)) == (before.identity, before.borders, scales)
    assert file.read_text() == whole


def test_a_file_of_another_harvest_is_made_anew(live):
    before = live()
    others = [live(seed=1), live(bucket_rows=200), live(dtype="bfloat16"), live(identity="another model")]
    identities = {buckets.identity for buckets in (before, *others)}
    assert len(identities) == 5
    assert live().identity == before.identity
    assert len(others[1].borders) > len(before.borders)


def test_a_text_that_changed_is_refused(live, corpus, monkeypatch):
    buckets = live(bucket_rows=200)
    buckets.rows(0)
    for path in sorted(corpus.iterdir()):  # as long as before: borders alone would not tell
        path.write_text(path.read_text().replace("return x + 1", "return x + 2"))
    with pytest.raises(TextError, match=rf"changed after it was read for .*{LIVE_FILE}.*delete that file"):
        live(bucket_rows=200)
    monkeypatch.setattr(bucket_index, "text_identity", lambda config: None)  # whose change no fingerprint shows
    changed = live(bucket_rows=200)
    with pytest.raises(TextError, match=rf"changed after it was read for .*{LIVE_FILE}.*delete that file"):
        list(map(changed.rows, range(len(changed.borders) - 1)))


def test_after_a_failure_the_next_bucket_is_made_all_the_same(live, model):
    buckets = live(bucket_rows=200)
    want = buckets.rows(2)
    good = model.capture

    def broken(sites, input_ids):
        activations = good(sites, input_ids)
        activations[sites[1]][0, 5, 0] = float("nan")
        return activations

    model.capture = broken
    fresh = live(bucket_rows=200)
    with pytest.raises(NonFinite, match=r"resid_post/layer_0, block \d+, position 5"):
        fresh.rows(1)
    fresh._capture = good
    assert all(np.array_equal(fresh.rows(2)[site], rows) for site, rows in want.items())


def test_partitions_and_texts_without_a_token_are_refused(live, tmp_path):
    with pytest.raises(ConfigError, match="partition"):
        live(partition=(1, 2))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    with pytest.raises(TextError):
        live(text=live().config.text.model_copy(update={"paths": (empty,)}))
