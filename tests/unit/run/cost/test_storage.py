"""Disk or live: sums done by hand, and the paper's own case."""

import math
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError
from everyscope.run.cost.machine import plan, plan_json
from everyscope.run.cost.prices import Rates
from everyscope.run.cost.storage import Rate, SiteDemand, StoragePlan, measure_disk, storage_plan
from everyscope.run.find import find_recipe
from everyscope.run.stages import stages_of

ONE_SITE = (SiteDemand(row_bytes=1000, rows=10**6, trained=(10**6,)),)

GIVEN = Rates(1e12, 1e12, "given")


def priced(sites=ONE_SITE, train=100.0, model=1e5, gbps=1.0, free=10**15) -> StoragePlan:
    """A plan on a disk that is large enough."""
    made = storage_plan(sites, train, Rate(model, "given"), Path("/"), gbps)
    return StoragePlan(**{**made.__dict__, "free_bytes": free})


def test_one_site_by_hand():
    price = priced()
    assert (price.disk_bytes, price.bytes_read, price.passes) == (10**9, 10**9, 1)
    assert (price.harvest_seconds, price.write_seconds, price.read_seconds) == (10, 1, 1)
    assert (price.disk_seconds, price.live_seconds, price.disk_again_seconds) == (110, 110, 100)
    assert price.advice == "disk"
    assert "keeps up" in price.reason


@pytest.mark.parametrize(
    ("trained", "sharing", "rows_read"),
    [((8,), 1, 8), ((8, 4, 4), 1, 16), ((4, 8, 4), 3, 8), ((8, 4, 4), 2, 12), ((8, 8, 4, 4, 2), 2, 14), ((5, 5), 7, 5)],
)
def test_groups_that_share_a_read_pay_for_the_longest(trained, sharing, rows_read):
    assert SiteDemand(3, 8, trained).bytes_read(sharing) == 3 * rows_read


def test_all_sites_are_written_and_read_but_the_model_runs_once():
    two = priced((SiteDemand(1000, 10**6, (10**6,)), SiteDemand(500, 10**6, (10**6, 5 * 10**5))))
    assert (two.disk_bytes, two.bytes_read, two.bytes_read_shared) == (1500 * 10**6, 1750 * 10**6, 1500 * 10**6)
    assert two.harvest_seconds == priced().harvest_seconds


def test_what_is_trained_on_more_rows_than_are_kept_is_made_again():
    price = priced((SiteDemand(1000, 10**6, (4 * 10**6,)),))
    assert price.passes == 4
    assert price.live_seconds == 4 * 10 + 100
    assert price.bytes_read == 4 * price.disk_bytes


@pytest.mark.parametrize("gbps", [0.001, 0.003, 0.01, 0.02, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("train", [1.0, 20.0, 1000.0])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_advice_is_the_quicker_way_and_disk_where_they_tie(gbps, train, passes):
    price = priced((SiteDemand(1000, 10**6, (passes * 10**6,)),), train, gbps=gbps)
    disk = max(10, 1 / gbps) + max(train, passes / gbps)
    live = 10 * passes + train
    assert (price.disk_seconds, price.live_seconds) == (pytest.approx(disk), pytest.approx(live))
    assert price.advice == ("live" if live < 0.95 * disk else "disk")
    repay = price.sweeps_to_repay
    first, again = max(10, 1 / gbps), max(train, passes / gbps)
    if repay is None:
        assert again >= live
    else:
        assert first + repay * again < repay * live
        assert repay == 1 or first + (repay - 1) * again >= (repay - 1) * live - 1e-6


def test_a_slow_disk_that_pays_later_says_from_when():
    price = priced(train=200.0, gbps=0.01)  # writing takes 100 s where the model takes 10, and then reading is hidden
    assert (price.disk_seconds, price.live_seconds, price.sweeps_to_repay) == (300, 210, 11)
    assert price.advice == "live"
    assert "pays from 11 trainings on" in price.reason
    assert "never pays" in priced(train=1.0, gbps=0.001).reason


def test_what_does_not_fit_is_live_however_quick_the_disk():
    price = priced(gbps=1e6, free=10**9 - 1)
    assert price.advice == "live"
    assert "are free" in price.reason
    assert priced(gbps=1e6, free=10**9).advice == "disk"


def test_one_9b_sae_needs_more_than_a_gibibyte_a_second():
    """Gemma Scope, section 3.3: a batch of 4096 rows of a 9B site in 45 ms."""
    steps = 8 * 10**9 // 4096
    price = priced((SiteDemand(3584 * 4, 8 * 10**9, (8 * 10**9,)),), train=steps * 0.045, gbps=1.22 * 2**30 / 1e9)
    assert price.read_seconds == pytest.approx(price.train_seconds, rel=0.01)


def test_rates_that_are_none_are_refused(tmp_path):
    site = SiteDemand(4, 8, (8,))
    for disk, model, flag in (
        (0.0, 1.0, "--disk-gbps"),
        (math.nan, 1.0, "--disk-gbps"),
        (1.0, -1.0, "--model-tokens-per-second"),
    ):
        with pytest.raises(ConfigError, match=flag):
            storage_plan([site], 1.0, Rate(model, "given"), tmp_path, disk)


def test_a_disk_is_measured_once_and_left_as_it_was(tmp_path):
    rate = measure_disk(tmp_path, 8 << 20)
    assert 0 < rate < math.inf
    assert measure_disk(tmp_path, 8 << 20) == rate
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="give --disk-gbps"):
        measure_disk(tmp_path / "none")


def test_a_recipe_s_plan_has_it():
    """tiny: 16 places, a training group at each of 12 sites and at each MLP; mlp_out is read by SAEs and by transcoders."""
    price = plan(stages_of(find_recipe("tiny"), Path()), GIVEN, disk_gbps=2.0, model_tokens_per_second=1000.0)
    storage = price.storage
    assert storage.disk_bytes == storage.bytes_read_shared == price.shard_bytes
    assert storage.bytes_read - storage.disk_bytes == 4 * 3 * 2**17 * 128 * 2
    assert storage.passes == 1
    assert storage.harvest_seconds == 3 * 2**17 / 1000
    assert storage.train_seconds == pytest.approx(price.train_flop / 1e12)
    assert plan_json(price)["storage"]["advice"] == storage.advice
    reread = find_recipe("tiny")
    reread = reread.model_copy(update={"harvest": reread.harvest.model_copy(update={"num_tokens": 2**16})})
    assert plan(stages_of(reread, Path()), GIVEN, disk_gbps=2.0).storage.passes == 6


def test_16k_and_131k_groups_of_a_9b_site_share_a_read():
    storage = plan(stages_of(find_recipe("gemma_2_9b"), Path()), Rates(1e14, 1e14, "given"), disk_gbps=1.0).storage
    assert storage.bytes_read > storage.bytes_read_shared > storage.disk_bytes
