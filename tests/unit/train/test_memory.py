"""What training says it takes of memory, against the engines' own tensors."""

import pytest
import torch
from counted_collective import Counting
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.gpu_limits import LEAST_ROOM
from everyscope.sae.mesh import Mesh
from everyscope.sae.trainable import new_sae
from everyscope.train.config import TrainSettings
from everyscope.train.engines import Dense
from everyscope.train.memory import (
    DevicePart,
    batch_bytes,
    dense_bytes,
    group_bytes,
    pairs_bytes,
    rounded_bytes,
    rounded_work_bytes,
    screen_bytes,
    state_bytes,
)

bf16_gpu = pytest.importorskip("everyscope.sae.bf16_gpu", reason="Triton is not installed")
pairs_gpu = pytest.importorskip("everyscope.sae.pairs_gpu", reason="Triton is not installed")

SIZES = [(16, 64, (1.0,)), (24, 100, (1.0,)), (40, 333, (0.1, 0.5, 1.0))]


def sae_of(d_in: int, width: int, shares=(1.0,), *, skip: bool = False):
    config = SaeConfig(width=width, sparsity_coefficient=1e-3, preset=SaePreset(prefix_shares=shares), skip=skip)
    return new_sae(config, d_in, d_out=d_in if skip else None)


def nbytes(value) -> int:
    """Bytes of all tensors in an object and the objects of our own that it holds."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, tuple | list):
        return sum(map(nbytes, value))
    if hasattr(value, "__dict__") and type(value).__module__.startswith("everyscope"):
        # `parts` of a Rounded holds its other tensors once more; `rows` are somebody else's.
        return sum(nbytes(part) for name, part in vars(value).items() if name not in ("rows", "norms", "residuals"))
    return 0


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    """Memory is what matters here, not what lies in it; Triton has no device to launch on."""
    monkeypatch.setattr(pairs_gpu, "round_rows", lambda *args, **kwargs: None)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("d_in", "width", "shares"), SIZES)
def test_the_state_is_that_of_a_trainable_sae(d_in, width, shares, skip):
    sae = sae_of(d_in, width, shares, skip=skip)
    assert state_bytes(DevicePart(1, d_in, width, has_skip=skip)) == sum(tensor.nbytes for tensor in sae.tensors().values())
    assert screen_bytes(d_in, width) == nbytes(pairs_gpu.Rounded(sae.parameters["W_enc"].T))


@pytest.mark.parametrize(("d_in", "width", "shares"), SIZES)
@pytest.mark.parametrize("rows", [16, 100])
@pytest.mark.parametrize("least", [1, LEAST_ROOM])
def test_the_work_space_by_pairs_is_that_of_the_engine(d_in, width, shares, rows, least, monkeypatch):
    monkeypatch.setattr("everyscope.sae.gpu_limits.LEAST_ROOM", least)
    sae = sae_of(d_in, width, shares)
    engine = pairs_gpu.GpuPairs([sae])
    buffers = engine._buffers_for(rows, d_in, sae.config.prefixes)
    assert pairs_bytes(DevicePart(rows, d_in, width, len(shares))) == nbytes(buffers)


@pytest.mark.parametrize(("d_in", "width", "shares"), SIZES)
@pytest.mark.parametrize("least", [1, LEAST_ROOM])
@pytest.mark.parametrize("skip", [False, True])
def test_the_bfloat16_engine_takes_what_is_planned(d_in, width, shares, least, skip, monkeypatch):
    monkeypatch.setattr("everyscope.sae.gpu_limits.LEAST_ROOM", least)
    sae = sae_of(d_in, width, shares, skip=skip)
    engine = bf16_gpu.GpuBfloat16([sae], crossover=0.1)
    rounded, part = engine._rounded[0], DevicePart(48, d_in, width, len(shares), skip)
    assert rounded_bytes(part) == nbytes([*rounded.weights, rounded.skip, engine._latents])
    work = engine._work_for(48, d_in, sae)
    without = nbytes(work)
    dense = work.dense
    held = without + nbytes([dense.f, dense.d_f, *dense.sums, dense.nobody.start])
    assert rounded_work_bytes(part, 3) == held


class Peak(TorchDispatchMode):
    """The most bytes of tensors that live at once, beyond those that are `known` before."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {place: (found, size) for place, (found, size) in self.alive.items() if not found.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize(("rows", "d_in", "width"), [(256, 16, 512), (64, 96, 512), (16, 64, 1024), (64, 64, 512)])
@pytest.mark.parametrize("shares", [(1.0,), (0.25, 1.0)])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(shards=2), Mesh(replicas=2)])
@pytest.mark.parametrize("skip", [False, True])
def test_a_dense_step_takes_no_more_memory_than_planned_and_not_much_less(rows, d_in, width, shares, mesh, skip):
    sae = sae_of(d_in, width, shares, skip=skip)
    x, y = (torch.randn(rows, d_in) / d_in**0.5 for _ in range(2))
    with Peak([x, y, *sae.tensors().values()]) as peak:
        Dense([sae], Counting(mesh)).step(x, 3, 100, y if skip else None)
    planned = dense_bytes(DevicePart(rows, d_in, width, len(shares), skip), is_shared=mesh.ranks > 1)
    assert 0.7 * planned <= peak.most <= planned


def test_a_group_is_its_saes_the_work_space_of_each_shape_and_the_largest_dense_step():
    saes = tuple(SaeConfig(width=width, sparsity_coefficient=1.0, seed=seed) for width, seed in ((64, 0), (64, 1), (100, 0)))
    narrow, wide = DevicePart(128, 24, 64), DevicePart(128, 24, 100)
    stays = 2 * (state_bytes(narrow) + screen_bytes(24, 64)) + state_bytes(wide) + screen_bytes(24, 100)
    work = pairs_bytes(narrow) + pairs_bytes(wide) + dense_bytes(wide)
    assert group_bytes(saes, 24, TrainSettings(batch_rows=128)) == stays + work + batch_bytes(128, 24)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_transcoders_take_a_second_side_of_each_batch_and_their_skips(precision):
    settings = TrainSettings(batch_rows=128, device="cuda", precision=precision)
    saes, skipping = (
        tuple(SaeConfig(width=w, sparsity_coefficient=1.0, skip=skip) for w in (4096, 8192)) for skip in (False, True)
    )
    plain = group_bytes(saes, 256, settings, num_sides=2)
    assert plain - group_bytes(saes, 256, settings) == batch_bytes(128, 256)
    skips = group_bytes(skipping, 256, settings, num_sides=2) - plain
    kept = 2 * (2 * 4 + (2 if precision == "bfloat16" else 0)) * 256**2  # parameter and means, and in bfloat16 a copy
    assert kept < skips <= kept + 4 * (6 * 256**2 + 2 * 128 * 256)


def test_shards_divide_what_stays_and_replicas_what_passes():
    sae = (SaeConfig(width=2**16, sparsity_coefficient=1.0),)
    one, halves, rows = (
        group_bytes(sae, 512, TrainSettings(batch_rows=1024, **ranks)) for ranks in ({}, {"latent_shards": 2}, {"replicas": 2})
    )
    assert 0.5 * one <= halves <= 0.56 * one
    assert state_bytes(DevicePart(1, 512, 2**16)) < rows < one
