"""Several ranks by pairs on a GPU step as one densely in float64; on a machine without a GPU, in Triton's interpreter.

As in tests/gpu/test_pairs_gpu.py a large epsilon lets parameters show their gradients, and 1e-5 is some hundred roundings.
"""

import os
from importlib.util import find_spec

import pytest
import torch

from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.mesh import Collective
from everyscope.sae.trainable import TENSORS, TrainableSae, dense_update, new_sae

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_kernels = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()),
    reason="torch sees no CUDA device, and triton, which could interpret, is not installed",
)
if INTERPRETED or torch.cuda.is_available():
    from everyscope.sae.bf16_gpu import GpuBfloat16
    from everyscope.sae.pairs_gpu import GpuPairs

D_IN, ROWS, STEPS = 20, 12, 3
RECIPE = SaePreset(
    learning_rate=0.05,
    threshold_learning_rate=0.02,
    learning_rate_warmup_steps=0,
    sparsity_warmup_steps=0,
    bandwidth=0.2,
    initial_threshold=0.6,
    beta2=0.9,
    epsilon=0.05,
    frequency_limit=0.3,
)
NESTED = SaeConfig(width=31, target_l0=3, target_weight=0.05, preset=RECIPE.model_copy(update={"prefix_shares": (0.2, 0.5, 1.0)}))
PLAIN = SaeConfig(width=26, sparsity_coefficient=0.05, preset=RECIPE)
SKIPPING = SaeConfig(width=26, sparsity_coefficient=0.05, preset=RECIPE, skip=True)
"""Of a transcoder; the others are SAEs'."""
AXES_OF = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "b_dec": None, "w_skip": None}


def start(config: SaeConfig, collective: Collective | None = None) -> TrainableSae:
    latents = collective.mesh.latents(config.width) if collective else range(config.width)
    sae = new_sae(config, D_IN, DEVICE, latents, D_IN if config.skip else None)
    if config.skip:
        sae.parameters["w_skip"].copy_(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(2)) * 0.05)
    biases = torch.randn(config.width, generator=torch.Generator().manual_seed(1)) * 0.05
    sae.parameters["b_enc"].copy_(biases[latents.start : latents.stop])
    return sae


def rows(config: SaeConfig, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    weights = torch.rand(ROWS, config.width, generator=generator) * (torch.rand(ROWS, config.width, generator=generator) < 0.1)
    noise = torch.randn(ROWS, D_IN, generator=generator) * 0.2 / D_IN**0.5
    directions = new_sae(config.model_copy(update={"skip": False}), D_IN).parameters["W_dec"]
    return (weights @ directions + noise).to(DEVICE)


def sides(config: SaeConfig, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = rows(config, step)
    return x, x.flip(1) if config.skip else x


def own(x: torch.Tensor, collective: Collective) -> torch.Tensor:
    return x.chunk(collective.mesh.replicas)[collective.mesh.replica].contiguous()


@needs_kernels
@pytest.mark.parametrize(
    ("config", "shards", "replicas"), [(PLAIN, 2, 1), (PLAIN, 1, 2), (NESTED, 3, 1), (NESTED, 2, 2), (SKIPPING, 2, 2)]
)
def test_ranks_step_as_one(in_threads, config, shards, replicas):
    oracle = start(config)
    for tensors in (oracle.parameters, oracle.squared):
        for name, tensor in tensors.items():
            tensors[name] = tensor.double()
    double = [tuple(side.double() for side in sides(config, step)) for step in range(STEPS)]
    wanted = [dense_update(oracle, x, step, STEPS, y) for step, (x, y) in enumerate(double)]
    assert min(float(want.l0) for want in wanted) > 0.5

    def work(collective: Collective):
        sae = start(config, collective)
        engine = GpuPairs([sae], ROWS * config.width, collective)
        engine.tensors()["uses_pairs"].fill_(True)
        losses = []
        for step in range(STEPS):
            x, y = (own(side, collective) for side in sides(config, step))
            losses += engine.step(x, step, STEPS, y)
        return sae, engine, losses

    done = in_threads(work, shards, replicas)
    for sae, engine, losses in done:
        assert engine.tensors()["skipped"].tolist() == [0]
        assert engine.tensors()["uses_pairs"].tolist() == [True]
        for got, want in zip(losses, wanted, strict=True):
            for name in ("reconstruction", "l0", "pairs"):
                assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5)
        twin = done[engine.collective.mesh.shard][0]
        assert all(torch.equal(tensor, twin.tensors()[name]) for name, tensor in sae.tensors().items())
        for name in (*TENSORS, *(["w_skip"] if config.skip else [])):
            assert AXES_OF[name] is not None or torch.equal(sae.parameters[name], done[0][0].parameters[name])
    for name in oracle.parameters:
        parts, axis = [sae.parameters[name] for sae, _, _ in done[:shards]], AXES_OF[name]
        together = parts[0] if axis is None else torch.cat(parts, axis)
        assert (together - oracle.parameters[name]).norm() < 1e-5 * oracle.parameters[name].norm(), name


@needs_kernels
@pytest.mark.parametrize("by_pairs", [True, False])
@pytest.mark.parametrize(("config", "shards", "replicas"), [(PLAIN, 1, 2), (NESTED, 3, 1), (SKIPPING, 2, 2)])
def test_ranks_step_as_one_in_bfloat16(in_threads, config, shards, replicas, by_pairs):
    """One step, for after it other numbers are rounded; what was rounded the other way shows as 1e-3 of a change at most."""
    alone, before = start(config), start(config)

    def stepped(sae: TrainableSae, x: torch.Tensor, y: torch.Tensor, **kwargs):
        engine = GpuBfloat16([sae], max_pairs=ROWS * config.width, crossover=1e9 if by_pairs else -1.0, **kwargs)
        engine.tensors()["uses_pairs"].fill_(by_pairs)
        return engine.step(x, 0, STEPS, y)[0]

    want = stepped(alone, *sides(config, 0))

    def work(collective: Collective):
        sae = start(config, collective)
        return sae, stepped(sae, *(own(side, collective) for side in sides(config, 0)), collective=collective)

    done = in_threads(work, shards, replicas)
    for _, got in done:
        for name in ("reconstruction", "l0", "pairs"):
            assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-5)
    for name in alone.parameters:
        parts, axis = [sae.parameters[name] for sae, _ in done[:shards]], AXES_OF[name]
        together = parts[0] if axis is None else torch.cat(parts, axis)
        change = alone.parameters[name] - before.parameters[name]
        assert (together - alone.parameters[name]).norm() < 1e-3 * change.norm(), name


@needs_kernels
def test_all_skip_a_step_that_does_not_fit_at_one_rank(in_threads):
    def work(collective: Collective):
        sae = start(PLAIN, collective)
        sae.parameters["b_enc"][: max(0, 3 - sae.first)] = 9.0  # the first shard has three pairs a row more
        before = {name: tensor.clone() for name, tensor in sae.tensors().items()}
        engine = GpuPairs([sae], ROWS * 2, collective)
        engine.tensors()["uses_pairs"].fill_(True)
        engine.step(rows(PLAIN, 0), 0, STEPS)
        same = all(torch.equal(sae.tensors()[name], tensor) for name, tensor in before.items())
        return same, engine.tensors()["skipped"].tolist(), engine.tensors()["counts"][0].tolist()

    got = in_threads(work, 2, 1)
    assert got[0] == got[1]
    assert got[0][:2] == (True, [1])
    assert got[0][2][0] > ROWS * 2
