"""Placements: every SAE once, no device twice, nothing that does not fit, and never far from the best."""

import itertools
import math
import random

import pytest

from everyscope.base.errors import ConfigError
from everyscope.cost.devices import DEVICES
from everyscope.cost.pieces import Bank, Piece, PlannedCode, divided, pieces_of, spread
from everyscope.cost.place import _schedule, _take, place
from everyscope.cost.step import summed_bytes

H100, TPU = DEVICES["h100"], DEVICES["tpuv3"]


def bank(widths, d_in=256, l0=20.0, tokens=10**7, batch=1024, site="resid_post/layer_0"):
    return Bank(site, d_in, tuple(PlannedCode(width, l0) for width in widths), tokens, batch, 4 * d_in)


def some_banks(seed: int) -> list[Bank]:
    rng = random.Random(seed)
    return [
        bank(
            [2 ** rng.randint(9, 16) for _ in range(rng.randint(1, 6))],
            d_in=rng.choice([64, 256]),
            tokens=rng.randint(10**6, 10**7),
            site=f"mlp_out/layer_{number}",
        )
        for number in range(rng.randint(1, 12))
    ]


SMALL = H100.model_copy(update={"memory_bytes": 600 << 20, "devices_per_host": 4})


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("devices", [4, 7, 8, 24])
def test_every_sae_is_placed_once_and_no_device_twice_at_a_time(seed, devices):
    banks = some_banks(seed)
    placement = place(banks, SMALL, devices)
    wanted = sorted((one.site, sae.width) for one in banks for sae in one.saes)
    assert sorted((placed.piece.bank.site, sae.width) for placed in placement.placed for sae in placed.piece.saes) == wanted
    for placed in placement.placed:
        assert placed.piece.memory <= 0.9 * SMALL.memory_bytes
        assert len(set(placed.devices)) == placed.piece.devices
        assert set(placed.devices) <= set(range(devices))
        hosts = {number // 4 for number in placed.devices}
        assert len(hosts) == math.ceil(placed.piece.devices / 4)
    for number in range(devices):
        spans = sorted((placed.start, placed.end) for placed in placement.placed if number in placed.devices)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    slow = placement.read_bytes / placement.seconds / 5
    assert (
        place(banks, SMALL, devices, slow).seconds_from(slow)
        <= placement.seconds_from(slow)
        == pytest.approx(5 * placement.seconds)
    )
    assert placement.least_seconds <= placement.seconds * (1 + 1e-9)
    assert placement.seconds <= 2 * placement.least_seconds


def best(times: list[float], devices: int) -> float:
    """The shortest makespan, by trying everything."""
    loads = {tuple([0.0] * devices)}
    for time in times:
        loads = {tuple(sorted((*load[:i], load[i] + time, *load[i + 1 :]))) for load in loads for i in range(devices)}
    return min(max(load) for load in loads)


@pytest.mark.parametrize("seed", range(20))
def test_longest_first_keeps_grahams_bound(seed):
    rng = random.Random(seed)
    devices = rng.randint(2, 4)
    pieces = [Piece(bank([1024], tokens=rng.randint(1, 60) * 10**5), (PlannedCode(1024, 20.0),), H100) for _ in range(9)]
    placement = _schedule(sorted(pieces, key=lambda piece: -piece.seconds), devices, 8)
    shortest = best([piece.seconds for piece in pieces], devices)
    assert shortest <= placement.seconds * (1 + 1e-9)
    assert placement.seconds <= (4 / 3 - 1 / (3 * devices)) * shortest * (1 + 1e-9)


@pytest.mark.parametrize("width", [2**power for power in range(12, 21)])
@pytest.mark.parametrize("count", [1, 5])
def test_replicas_are_the_fewest_at_which_copying_hides(width, count):
    """r >= n F / (3 width host_rate), once over all widths: batch and d_in cancel where compute is dense."""
    device = TPU.model_copy(update={"memory_bytes": 10**15, "interconnect_bandwidth": 1e18, "network_bandwidth": 1e18})
    piece = Piece(bank([width] * count, d_in=2304, batch=4096), tuple([PlannedCode(width, 100.0)] * count), device)
    needed = 8 * 123e12 * 0.508 / (3 * width * count * device.host_rate)
    chosen = spread(piece, 8)
    assert chosen is not None
    if needed > 8:
        assert chosen.copy > chosen.step.total
    else:
        assert chosen.replicas == max(1, 2 ** math.ceil(math.log2(needed)))
        assert chosen.copy <= chosen.step.total


def test_narrow_saes_of_the_paper_split_the_batch_and_wide_ones_the_latents():
    """Section 3.3: 16.4K by data alone, wider ones by latents. On 8 chips our rule gives 4, 2, 1, 1 replicas."""
    replicas = []
    for width in (2**14, 2**15, 2**16, 2**17):
        chosen = spread(Piece(bank([width], d_in=2304, batch=4096), (PlannedCode(width, 100.0),), TPU), 8)
        assert chosen is not None
        replicas.append(chosen.replicas)
    assert replicas == [4, 2, 1, 1]


def test_a_bank_is_divided_by_saes_before_latents():
    narrow = pieces_of(bank([1024] * 6), H100, 8)
    assert [(len(piece.saes), piece.devices) for piece in narrow] == [(6, 1)]
    tight = H100.model_copy(
        update={"memory_bytes": int(Piece(bank([1024]), (PlannedCode(1024, 20.0),) * 2, H100).memory / 0.9) + 2}
    )
    assert [(len(piece.saes), piece.devices) for piece in pieces_of(bank([1024] * 6), tight, 8)] == [(2, 1)] * 3
    (wide,) = pieces_of(bank([2**20], d_in=2304, batch=4096), H100, 8)
    assert (wide.shards, wide.replicas) == (4, 1)
    with pytest.raises(ConfigError, match=r"an SAE of 1048576 latents needs .* on each of 2 h100, .*plan for more devices"):
        pieces_of(bank([2**20], d_in=2304, batch=4096), H100, 2)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_longest_piece_is_divided_until_devices_need_not_wait_for_it(share):
    pieces = pieces_of(bank([2**14] * 4 + [2**16], tokens=10**8), H100, 16)
    parts = divided(pieces, 16, share)
    area = sum(part.seconds * part.devices for part in parts)
    longest = max(parts, key=lambda part: part.seconds)
    assert longest.seconds <= share * area / 16 or len(longest.saes) == 1
    assert sorted(sae.width for part in parts for sae in part.saes) == [2**14] * 4 + [2**16]


def test_bytes_over_links_are_those_of_all_steps():
    code = PlannedCode(4096, 20.0)
    one = bank([4096], d_in=128, tokens=10_240, batch=1024)
    alone, sharded, copied = (Piece(one, (code,), H100, shards, replicas) for shards, replicas in ((1, 1), (4, 1), (1, 4)))
    assert alone.summed_bytes == (0, 0)
    assert alone.host_bytes == alone.disk_bytes == 10_240 * 128 * 4
    assert sharded.host_bytes == 4 * alone.host_bytes
    assert sharded.disk_bytes == alone.disk_bytes
    assert sharded.summed_bytes == (10 * summed_bytes(sharded.loads[0], 4, 1, "dense")[0], 0)
    assert sharded.summed_bytes[0] == pytest.approx(10 * 4 * 1024 * 128, rel=2e-3)  # a reconstruction a step, and little else
    assert copied.host_bytes == alone.host_bytes
    assert copied.summed_bytes == (0, 10 * summed_bytes(copied.loads[0], 1, 4, "dense")[1])
    assert copied.summed_bytes[1] == pytest.approx(10 * 4 * 2 * 128 * 4096, rel=0.03)  # both weights' gradients
    both = Piece(one, (code,), H100, 2, 2)
    assert both.summed_bytes == pytest.approx((sharded.summed_bytes[0], copied.summed_bytes[1]), rel=2e-3)
    assert Piece(one, (code,), H100, 16).disk_bytes == 2 * alone.disk_bytes  # two hosts


def test_pieces_of_many_devices_take_whole_hosts():
    free = [[0, 1, 2, 3], [4, 5], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert _take(free, 2, 4) == (4, 5)
    assert _take(free, 8, 4) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert _take(free, 8, 4) is None
    assert free == [[], [], [], [12, 13, 14, 15]]
    sixes = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert _take(sixes, 8, 6) == tuple(range(8))
    assert sixes == [[], [8, 9, 10, 11]]
