"""A recipe on a cluster: what the report says adds up, is printed, and bends as it should."""

import argparse
import io
import json
import math
import subprocess
import sys

import pytest
from rich.console import Console

from everyscope.base.errors import ConfigError
from everyscope.cost.cluster import banks_of, cluster_plan, curve
from everyscope.cost.cluster_report import ClusterReport, cluster_report, curve_table, plan_json, wants_cluster
from everyscope.cost.devices import DEVICES, device_of
from everyscope.cost.machine import plan
from everyscope.cost.step import ASSUMED
from everyscope.run.find import find_recipe


@pytest.fixture(scope="module")
def on_64():
    return cluster_plan(find_recipe("gemma_2_2b"), 64, "h100")


def printed(report: ClusterReport) -> str:
    text = io.StringIO()
    for table in report.tables():
        Console(file=text, width=200).print(table)
    return text.getvalue()


def test_banks_are_the_recipes():
    config = find_recipe("gemma_2_2b")
    banks, price = banks_of(config), plan(config, teraflops=1.0, disk_gbps=1.0)
    assert sum(len(bank.saes) for bank in banks) == len(price.saes) == 822
    assert sum(sae.width for bank in banks for sae in bank.saes) == price.num_latents
    assert {sae.l0 for bank in banks for sae in bank.saes} == {100.0}
    assert {sae.l0 for bank in banks_of(find_recipe("tiny")) for sae in bank.saes} == {12, 25, 50}


def test_json_holds_every_sae_and_shares_that_add_up(on_64):
    value = json.loads(json.dumps(plan_json(on_64)))
    assert sum(len(piece["widths"]) for piece in value["pieces"]) == 822
    assert sum(value["shares"].values()) == pytest.approx(1)
    assert value["shares"][value["bottleneck"]] == max(value["shares"].values())
    assert value["hours"] * 3600 == pytest.approx(value["harvest"]["seconds"] + value["train_seconds"])
    assert value["assumed"] == ASSUMED
    assert value["device"]["bfloat16_flops"] == 989e12
    ends = max(piece["end"] for piece in value["pieces"])
    assert ends == value["train_seconds"] >= value["least_train_seconds"]


def test_bytes_are_those_of_the_plan_without_a_cluster(on_64):
    price = plan(find_recipe("gemma_2_2b"), teraflops=1.0, disk_gbps=1.0)
    assert on_64.links["disk written"] == price.shard_bytes
    assert on_64.shared_read_bytes == price.storage.bytes_read  # every bank once
    assert on_64.links["disk read"] >= price.storage.bytes_read
    assert on_64.harvest.flop == price.harvest_flop


def test_a_slow_disk_is_the_bottleneck_and_its_rate_is_what_was_needed(on_64):
    config = find_recipe("gemma_2_2b")
    needed = on_64.needed_disk_rate / 1e9
    enough, tenth = (cluster_plan(config, 64, "h100", disk_gbps=rate) for rate in (1.001 * needed, needed / 10))
    assert enough.train_seconds == on_64.train_seconds
    assert 5 * on_64.train_seconds < tenth.train_seconds <= 10.001 * on_64.train_seconds  # pieces that read less are taken
    assert tenth.links["disk read"] <= on_64.links["disk read"]
    assert tenth.bottleneck == "disk"
    assert tenth.train_seconds == pytest.approx(tenth.links["disk read"] / tenth.disk_rate)
    assert tenth.harvest.seconds == max(tenth.harvest.compute_seconds, tenth.harvest.write_seconds)


def test_a_measured_utilisation_takes_the_place_of_the_roofline():
    config = find_recipe("gemma_2_27b")
    half, quarter = (cluster_plan(config, 16, "h100", utilisation=share) for share in (0.5, 0.25))
    assert quarter.placement.busy == pytest.approx(2 * half.placement.busy, rel=0.05)  # but for sums over links
    flop = 12 * 4608 * 2**17 * 4096 * (8 * 10**9 // 4096) * 18
    products = sum(piece.step.products * piece.bank.steps * piece.devices for piece in half.pieces)
    assert products == pytest.approx(flop / (0.5 * 989e12))


def test_a_model_larger_than_a_device_is_spread_and_only_one_of_its_devices_computes():
    config = find_recipe("gemma_2_27b")  # 54 GB in bfloat16
    fits, spread = cluster_plan(config, 8, "h100").harvest, cluster_plan(config, 8, "tpuv3").harvest
    assert (fits.devices_per_model, spread.devices_per_model) == (1, 2)
    assert spread.compute_seconds == pytest.approx(spread.flop / (4 * 123e12 * 0.6))
    small = DEVICES["h100"].model_copy(update={"memory_bytes": 10**9})
    assert math.ceil(config.shape.num_parameters * 2 / (small.memory_bytes * small.usable_memory)) == 61
    with pytest.raises(ConfigError, match=r"the model's 50.7 GiB do not fit 1 tpuv3; plan for 2 or more --gpus"):
        cluster_plan(config, 1, "tpuv3")


def test_the_curve_never_slows_down_and_never_beats_its_devices():
    lines = curve(find_recipe("gemma_2_2b"), "h100")
    assert [line["devices"] for line in lines] == [4, 8, 16, 32, 64, 128, 256, 512, 1024]  # 2^20 latents fit none less
    hours = [line["hours"] for line in lines]
    assert hours == sorted(hours, reverse=True)
    assert all(line["efficiency"] <= 1.02 for line in lines)  # the least number is not quite fully used itself
    assert lines[0]["speed_up"] == 4
    assert all(sum(line["shares"].values()) == pytest.approx(1) for line in lines)


def test_the_report_names_pieces_totals_bottleneck_and_assumptions():
    report = cluster_report(find_recipe("gemma_2_2b"), 16, "h200", with_curve=True)
    text = printed(report)
    for word in (
        "resid_post",
        "1 x 1m",
        "bottleneck",
        "products",
        "disk read",
        "host to device",
        "Assumed",
        "data sheets",
        "speed-up",
    ):
        assert word in text
    assert [line["devices"] for line in report.as_json()["curve"]] == [2, 4, 8, 16]
    assert "curve" not in cluster_report(find_recipe("tiny"), 3, "a100").as_json()
    assert [line["devices"] for line in cluster_report(find_recipe("tiny"), 3, "a100", with_curve=True).curve] == [1, 2, 3]
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


FLAGS = {"gpus": None, "gpu": None, "mfu": None, "curve": False, "teraflops": None, "model_tokens_per_second": None}


def test_flags_that_do_not_go_together_are_refused():
    assert not wants_cluster(argparse.Namespace(**FLAGS))
    assert not wants_cluster(argparse.Namespace(**FLAGS | {"teraflops": 1.0}))
    assert wants_cluster(argparse.Namespace(**FLAGS | {"gpus": 8, "gpu": "h100", "mfu": 0.4, "curve": True}))
    for flags, message in (
        ({"gpu": "h100"}, "--gpus N"),
        ({"curve": True}, "--curve is about a cluster"),
        ({"gpus": 8}, "add --gpu with h100, h200"),
        ({"gpus": 8, "gpu": "h100", "teraflops": 1.0}, "--teraflops is about this machine"),
    ):
        with pytest.raises(ConfigError, match=message):
            wants_cluster(argparse.Namespace(**FLAGS | flags))


def test_planning_loads_no_torch():
    code = "import sys, everyscope.cost.cluster_report; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
