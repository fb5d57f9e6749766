"""A run on a simulated cluster: what the report says adds up, is printed, and is what the run itself would do."""

import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from everyscope.base.errors import ConfigError
from everyscope.run.cost.cluster import Placed, cluster_plan, curve, scheduled
from everyscope.run.cost.cluster_report import cluster_plan_json, cluster_report, curve_table
from everyscope.run.cost.machine import plan
from everyscope.run.cost.prices import Rates
from everyscope.run.find import find_recipe
from everyscope.run.placement import Devices
from everyscope.run.stages import stages_of
from everyscope.train.devices import DEVICES, device_of
from everyscope.train.step_time import ASSUMED


@pytest.fixture(scope="module")
def on_64():
    return cluster_plan(find_recipe("gemma_2_2b"), 64, "h100")


def test_groups_are_those_that_a_run_on_such_a_cluster_trains(on_64):
    h100 = DEVICES["h100"]
    stages = stages_of(find_recipe("gemma_2_2b"), Path(), Devices(h100.memory_bytes, 8, 64))
    assert sorted(placed.group.group_id for placed in on_64.placed) == sorted(group.group_id for group in stages.groups)


def test_json_holds_every_sae_and_shares_that_add_up(on_64):
    value = json.loads(json.dumps(cluster_plan_json(on_64)))
    assert sum(len(group["widths"]) for group in value["groups"]) == 822
    assert sum(value["shares"].values()) == pytest.approx(1)
    assert value["shares"][value["bottleneck"]] == max(value["shares"].values())
    assert value["hours"] * 3600 == pytest.approx(value["harvest"]["seconds"] + value["train_seconds"])
    assert value["assumed"] == ASSUMED
    assert max(group["end"] for group in value["groups"]) == value["train_seconds"]


def test_bytes_are_those_of_the_plan_without_a_cluster(on_64):
    price = plan(stages_of(find_recipe("gemma_2_2b"), Path()), Rates(1e12, 1e12, "given"), disk_gbps=1.0)
    assert on_64.harvest.written_bytes == price.shard_bytes
    assert on_64.read_bytes >= price.storage.bytes_read
    assert on_64.harvest.flop == price.harvest_flop


@pytest.mark.parametrize(("devices", "per_host"), [(4, 8), (24, 8), (7, 4)])
def test_no_device_is_used_twice_and_the_order_is_near_the_best(devices, per_host):
    device = DEVICES["h100"].model_copy(update={"devices_per_host": per_host})
    stages = stages_of(find_recipe("gemma_2_2b"), Path(), Devices(device.memory_bytes, min(devices, per_host), devices))
    placed = scheduled([Placed(group, 2304, 100.0, 1, device) for group in stages.groups], devices)
    assert len(placed) == len(stages.groups)
    changes = sorted(
        itertools.chain.from_iterable(((one.start, one.devices), (one.start + one.seconds, -one.devices)) for one in placed)
    )
    used = list(itertools.accumulate(count for _, count in changes))
    assert max(used) <= devices
    assert used[-1] == 0
    least = max(sum(one.seconds * one.devices for one in placed) / devices, max(one.seconds for one in placed))
    assert least <= max(one.start + one.seconds for one in placed) <= 1.5 * least


def test_a_slow_disk_is_the_bottleneck_and_its_rate_is_what_was_needed(on_64):
    config = find_recipe("gemma_2_2b")
    needed = on_64.needed_disk_rate / 1e9
    enough, tenth = (cluster_plan(config, 64, "h100", disk_gbps=rate) for rate in (1.001 * needed, needed / 10))
    assert enough.train_seconds == on_64.train_seconds
    assert tenth.train_seconds == pytest.approx(10 * on_64.train_seconds)
    assert tenth.bottleneck == "disk"


def test_a_measured_utilisation_takes_the_place_of_the_roofline():
    config = find_recipe("gemma_2_27b")
    half, quarter = (cluster_plan(config, 16, "h100", utilisation=share) for share in (0.5, 0.25))
    flop = 12 * 4608 * 2**17 * 4096 * (8 * 10**9 // 4096) * 18
    for plan_, share in ((half, 0.5), (quarter, 0.25)):
        products = sum(placed.step.products * placed.group.steps * placed.devices for placed in plan_.placed)
        assert products == pytest.approx(flop / (share * 989e12))


def test_a_model_larger_than_a_device_is_spread_and_only_one_of_its_devices_computes():
    config = find_recipe("gemma_2_27b")  # 54 GB in bfloat16
    fits, spread = cluster_plan(config, 8, "h100").harvest, cluster_plan(config, 8, "tpuv3").harvest
    assert (fits.devices_per_model, spread.devices_per_model) == (1, 2)
    assert spread.compute_seconds == pytest.approx(spread.flop / (4 * 123e12 * 0.6))
    with pytest.raises(ConfigError, match=r"the model's 50.7 GiB do not fit 1 tpuv3; plan for 2 or more --gpus"):
        cluster_plan(config.model_copy(update={"groups": find_recipe("tiny").groups}), 1, "tpuv3")


def test_the_curve_never_slows_down_and_never_beats_its_devices():
    lines = curve(find_recipe("gemma_2_2b"), "h100")
    assert [line["devices"] for line in lines] == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]  # 2^20 latents fit none less
    hours = [line["hours"] for line in lines]
    assert hours == sorted(hours, reverse=True)
    assert all(line["efficiency"] <= 1.05 for line in lines)  # the least number is not quite fully used itself
    assert lines[0]["speed_up"] == 2
    assert max(line["most_shards"] for line in lines) <= 8  # one SAE lies on one host
    assert all(sum(line["shares"].values()) == pytest.approx(1) for line in lines)


def test_the_report_names_groups_totals_bottleneck_and_assumptions():
    found, tables = cluster_report(find_recipe("gemma_2_2b"), 16, "h200", with_curve=True)
    text = io.StringIO()
    for table in tables:
        Console(file=text, width=200).print(table)
    for word in ("resid_post", "x 1m", "products", "disk written, read", "Assumed", "data sheets", "speed-up"):
        assert word in text.getvalue()
    assert [line["devices"] for line in found["curve"]] == [1, 2, 4, 8, 16]
    found, _ = cluster_report(find_recipe("tiny"), 3, "a100")
    assert "curve" not in found
    assert sum(len(group["widths"]) for group in found["groups"]) == 84
    assert "50.8% model FLOP utilisation" in str(curve_table([], "none", DEVICES["tpuv3"]).caption)


def test_measured_rates_come_from_a_file(tmp_path):
    file = tmp_path / "ours.json"
    file.write_text(json.dumps({"kind": "h100", "host_bandwidth": 20e9, "product_share": 0.7}))
    ours = device_of(str(file))
    assert (ours.name, ours.host_bandwidth, ours.product_share) == ("ours", 20e9, 0.7)
    assert ours.memory_bandwidth == DEVICES["h100"].memory_bandwidth
    assert "h100" in ours.origin
    file.write_text(json.dumps(DEVICES["a100"].as_json()))
    assert device_of(str(file)) == DEVICES["a100"]
    for content, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "expected an object"),
        ('{"kind": "abacus"}', "abacus"),
        ('{"kind": "h100", "host_bandwidth": -1}', "host_bandwidth"),
        ('{"kind": "h100", "beads": 10}', "beads"),
        ("{}", "bfloat16_flops"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message) as caught:
            device_of(str(file))
        assert "\n" not in str(caught.value)
    for kind in ("abacus", str(tmp_path / "none.json")):
        with pytest.raises(ConfigError, match=r"--gpu"):
            device_of(kind)


def test_numbers_out_of_range_are_refused():
    config = find_recipe("tiny")
    for devices, rates, flag in (
        (0, {}, "--gpus"),
        (1, {"disk_gbps": 0.0}, "--disk-gbps"),
        (1, {"disk_gbps": math.nan}, "--disk-gbps"),
        (1, {"utilisation": 1.5}, "--mfu"),
    ):
        with pytest.raises(ConfigError, match=flag):
            cluster_plan(config, devices, "h100", **rates)


def test_planning_loads_no_torch():
    code = "import sys, everyscope.run.cost.cluster_report; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_dollars_are_those_of_all_devices_for_the_whole_time():
    found, tables = cluster_report(find_recipe("gemma_2_2b"), 16, "h100", dollars=2.5)
    assert found["dollars"] == pytest.approx(16 * found["hours"] * 2.5)
    cells = [list(column.cells) for column in tables[1].columns]
    assert cells[1][cells[0].index("cost")] == f"${found['dollars']:,.0f}: 16 devices at $2.5 an hour each"
