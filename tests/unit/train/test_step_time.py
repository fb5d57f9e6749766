"""Times against sums done by hand and the paper's figure; bytes over links against what the engines sum."""

import importlib
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from counted_collective import Counting

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.mesh import Axis, Mesh
from everyscope.sae.pairs_cpu import CpuPairs
from everyscope.sae.trainable import new_sae
from everyscope.train.devices import DEVICES
from everyscope.train.engines import Dense
from everyscope.train.memory import DevicePart
from everyscope.train.step_time import (
    HIGHEST_RATE,
    RATE_SPREAD,
    Load,
    all_reduce_seconds,
    compute_time,
    copy_seconds,
    pairs_traffic,
    summed_bytes,
    touched_share,
)

pairs_gpu = pytest.importorskip("everyscope.sae.pairs_gpu", reason="Triton is not installed")
bf16_gpu = importlib.import_module("everyscope.sae.bf16_gpu")

TPU = DEVICES["tpuv3"]


def test_traffic_by_pairs_is_what_the_benchmark_counts():
    sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
    benchmark = importlib.import_module("gpu_ways")
    rows, d_in, width, touched, pairs, listed = 64, 24, 512, 70, 3.5, 350
    way = SimpleNamespace(
        sae=SimpleNamespace(config=SimpleNamespace(width=width), touched=torch.tensor([9] * touched + [2] * 5)),
        steps_done=9,
        losses=SimpleNamespace(pairs=torch.tensor(pairs)),
        engine=SimpleNamespace(tensors=lambda: {"counts": torch.full((8, 1), listed)}),
    )
    load = Load(DevicePart(rows, d_in, width), pairs)
    assert pairs_traffic(load, touched, pairs * rows, listed, cache_share=0) == benchmark.bytes_of(way, rows, d_in)


@pytest.mark.parametrize("rate", [1e-5, 1e-3, 2e-2])
@pytest.mark.parametrize("rows", [1, 256, 4096])
def test_touched_latents_are_those_of_a_simulation(rate, rows):
    rates = (
        torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double().mul(RATE_SPREAD).sub(RATE_SPREAD**2 / 2).exp()
    )
    simulated = float((1 - (1 - (rates * rate).clamp(max=HIGHEST_RATE)) ** rows).mean())
    assert touched_share(rate, rows) == pytest.approx(simulated, rel=0.03)


def test_131k_latents_of_9b_on_8_tpus_take_45_ms_at_the_papers_utilisation():
    """Gemma Scope, section 3.3: a 131K SAE, a batch in 45 ms on 8 TPUv3 chips, about 50.8 % utilisation.

    From Google's peak of 123 Tflop/s, 12 operations per row, input and latent, d_in 3,584 and batch 4,096 follow 46.2 ms, or
    52.1 % at 45 ms: the paper's pair is met within 3 %, and would be met exactly with a peak of 126 Tflop/s.
    """
    load = Load.of(3584, 2**17, 100, 4096, shards=8)
    step = compute_time(load, TPU).total
    assert step == pytest.approx(0.045, rel=0.03)
    assert step * 0.508 / 0.045 == pytest.approx(0.521, abs=0.001)  # what 45 ms are of the documented peak
    implied = 12 * 4096 * 3584 * 2**17 / (8 * 0.045 * 0.508)
    assert implied / 1e12 == pytest.approx(126, abs=0.5)
    by_attention = compute_time(Load.of(4096, 2**17, 100, 4096, 8), TPU).total
    assert by_attention == pytest.approx(0.0528, abs=1e-4)  # so the figure is a residual or MLP site's


def test_a_batch_of_9b_at_45_ms_is_more_than_a_gibibyte_a_second():
    batch = copy_seconds(4096, 3584, TPU) * TPU.host_rate
    assert batch / 0.045 / 2**30 == pytest.approx(1.22, abs=0.01)


def test_shards_and_replicas_divide_work_and_leave_pairs_as_they_are():
    whole = Load.of(96, 1000, 20, 256)
    for shards, replicas in [(2, 1), (1, 4), (4, 2), (5, 8)]:
        part = Load.of(96, 1000, 20, 256, shards, replicas)
        assert (part.part.width * shards, part.part.rows * replicas) == (whole.part.width, whole.part.rows)
        assert part.pairs * shards == pytest.approx(whole.pairs)
        assert part.step_kind("float32") == whole.step_kind("float32")
    uneven = Load.of(96, 1000, 20, 100, 3, 3)
    assert (uneven.part.width, uneven.part.rows) == (334, 34)


def test_a_dense_step_is_ten_operations_and_one_by_pairs_two():
    device = DEVICES["h100"].model_copy(update={"product_share": 1.0, "memory_share": 1.0})
    dense, sparse = Load.of(2304, 2**14, 100, 4096), Load.of(2304, 2**17, 100, 4096)
    assert (dense.step_kind("float32"), sparse.step_kind("float32")) == ("dense", "pairs_gpu")
    assert compute_time(dense, device, "float32").products == pytest.approx(10 * 4096 * 2304 * 2**14 / 67e12)
    mean = 0.1 * 10 / 67e12 + 0.9 * 2 / 989e12  # a tenth of the steps is dense
    assert compute_time(sparse, device, "float32").products == pytest.approx(mean * 4096 * 2304 * 2**17)


def test_in_bfloat16_a_step_is_the_faster_of_both_ways():
    """By pairs one product of five and the touched latents' weights; densely all five, and no gathers, whatever the L0 is."""
    device = DEVICES["h200"].model_copy(update={"product_share": 1.0, "memory_share": 1.0})
    rows, d_in, width = 4096, 2304, 2**14
    product = 2 * rows * d_in * width / 989e12
    sparse, crowded, full = (compute_time(Load.of(d_in, width, l0, rows), device) for l0 in (100, 6000, 9000))
    assert sparse.products == pytest.approx(product)
    assert crowded.products == full.products == pytest.approx(5 * product)
    assert crowded.traffic == full.traffic == pytest.approx((9 * 2 * rows * width + 36 * d_in * width) / 4.8e12)
    assert sparse.total < crowded.total
    # A prototype took 3.1, 6.6 and 15.1 ms on that device; a roofline without latencies lies below, within a factor of 3.
    for d, latents, seconds in [(2304, 2**14, 3.09e-3), (2304, 2**16, 6.6e-3), (3584, 2**17, 15.1e-3)]:
        assert seconds / 3 < compute_time(Load.of(d, latents, 100, rows), DEVICES["h200"]).total < seconds


def ring(payload: list[float]) -> list[float]:
    """Bytes sent by each device in a ring all-reduce of equal chunks: each passes on all chunks but one, twice."""
    devices = len(payload)
    sent, chunk = [0.0] * devices, payload[0] / devices
    for _ in range(2):
        for _ in range(devices - 1):
            for device in range(devices):
                sent[device] += chunk
    return sent


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_an_all_reduce_takes_what_a_ring_sends(devices):
    assert all_reduce_seconds(1200.0, devices, 10.0) == pytest.approx(ring([1200.0] * devices)[0] / 10)


MESHES = [Mesh(2, 1), Mesh(1, 2), Mesh(2, 2, rank=3)]


def summed(engine, mesh: Mesh, shares, *, skip: bool = False) -> tuple[dict[Axis, int], Load, int]:
    """What a rank sums in a step of a small SAE, its load, and how many latents moved."""
    preset = SaePreset(prefix_shares=shares, initial_threshold=0.35)
    config = SaeConfig(width=200, sparsity_coefficient=1e-3, preset=preset, skip=skip)
    sae = new_sae(config, 24, latents=mesh.latents(200), d_out=24 if skip else None)
    collective = Counting(mesh)
    x = torch.nn.functional.normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)))
    engine([sae], collective=collective).step(x, 0, 100)
    load = Load.of(24, 200, 10.0, 64 * mesh.replicas, mesh.shards, mesh.replicas, len(shares), skip)
    return collective.bytes, load, int((sae.touched == 1).sum())


@pytest.mark.parametrize("shares", [(1.0,), (0.3, 1.0)])
@pytest.mark.parametrize(("engine", "way"), [(Dense, "dense"), (CpuPairs, "pairs_cpu")])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_what_ranks_sum_in_a_step_is_what_the_engines_sum(shares, engine, way, mesh, skip):
    counted, load, moving = summed(engine, mesh, shares, skip=skip)
    assert way == "dense" or 0 < moving < load.part.width
    assert (counted["shards"], counted["replicas"]) == summed_bytes(load, mesh.shards, mesh.replicas, way, moving)
    assert counted["all"] == 0


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="Triton interprets nothing here")
def test_by_pairs_on_a_gpu_too():
    """In Triton's interpreter."""

    def pairs(saes, collective):
        engine = pairs_gpu.GpuPairs(saes, collective=collective)
        engine.tensors()["uses_pairs"].fill_(True)
        return engine

    mesh = MESHES[-1]
    counted, load, _ = summed(pairs, mesh, (1.0,))
    assert (counted["shards"], counted["replicas"]) == summed_bytes(load, mesh.shards, mesh.replicas, "pairs_gpu")
    assert counted["all"] == 8 * mesh.ranks


@pytest.mark.skipif(find_spec("triton") is None or torch.cuda.is_available(), reason="Triton interprets nothing here")
@pytest.mark.parametrize("crossover", [1.0, 0.0])
@pytest.mark.parametrize("mesh", MESHES)
def test_in_bfloat16_by_pairs_and_densely_alike(mesh, crossover):
    """In Triton's interpreter."""

    def rounded(saes, collective):
        engine = bf16_gpu.GpuBfloat16(saes, collective=collective, crossover=crossover)
        engine.tensors()["uses_pairs"].fill_(crossover > 0)
        return engine

    counted, load, _ = summed(rounded, mesh, (1.0,))
    assert (counted["shards"], counted["replicas"]) == summed_bytes(load, mesh.shards, mesh.replicas, "bfloat16")
    assert counted["all"] == 8 * mesh.ranks


def test_random_loads_have_finite_positive_times():
    rng = random.Random(0)
    for _ in range(200):
        load = Load.of(rng.randint(1, 5000), rng.randint(1, 2**21), rng.uniform(0.1, 500), rng.randint(1, 8192), 1, 1)
        for device in DEVICES.values():
            for products in ("float32", "bfloat16"):
                assert 0 < compute_time(load, device, products).total < float("inf")


def test_a_skip_costs_its_products_and_what_its_state_takes_to_pass():
    plain, skipping = (compute_time(Load.of(2304, 2**14, 50, 4096, has_skip=skip), TPU) for skip in (False, True))
    assert TPU.utilisation is not None
    want = 4 * 4096 * 2304**2 / (TPU.bfloat16_flops * TPU.utilisation)
    assert skipping.products - plain.products == pytest.approx(want)
