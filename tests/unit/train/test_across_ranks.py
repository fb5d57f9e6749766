"""Steps of several ranks are the steps of one: gradients, decisions, phases. In threads: sums are all there is between ranks.

Steps differ from one process's by the order of sums alone: 1e-5 of the distance moved is some ten times what that makes here.
"""

from typing import Any

import pytest
import torch

from everyscope.sae import pairs_cpu
from everyscope.sae.across_ranks import shared_gradients
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.functional import loss_gradients
from everyscope.sae.mesh import ALONE, Collective
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.objective import penalty
from everyscope.sae.presets import fast, fast_transcoder
from everyscope.sae.thresholds import warm_start
from everyscope.sae.trainable import TENSORS, new_sae
from everyscope.train.training_group import TargetSide, TrainingGroup

D_IN, ROWS, STEPS, TOLERANCE = 12, 48, 25, 1e-5
FIXED = {"learning_rate": 2e-3, "learning_rate_warmup_steps": 3, "sparsity_warmup_steps": 5}
NESTED = SaePreset(bandwidth=0.1, initial_threshold=0.4, frequency_limit=0.1, prefix_shares=(0.1, 0.5, 1.0), **FIXED)
SAES = (
    SaeConfig(width=64, sparsity_coefficient=1e-2, preset=SaePreset(bandwidth=0.05, initial_threshold=0.5, **FIXED)),
    SaeConfig(width=61, target_l0=4, preset=fast(D_IN)),
    SaeConfig(width=50, target_l0=6, target_weight=1, preset=NESTED),
)
MESHES = [(2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (3, 2)]


D_OUT = 9
TRANSCODERS = (
    SaeConfig(width=64, sparsity_coefficient=1e-2, preset=SaePreset(bandwidth=0.05, initial_threshold=0.5, **FIXED), skip=True),
    SaeConfig(width=61, target_l0=4, preset=fast_transcoder(D_IN)),
    SaeConfig(width=50, target_l0=6, target_weight=1, preset=NESTED, skip=True),
)


def rows(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(ROWS, D_IN, generator=generator) / D_IN**0.5 * (1 + torch.rand(ROWS, 1, generator=generator))


def targets(step: int) -> torch.Tensor:
    return (rows(step) @ rows(1000)[:D_IN, :D_OUT]).relu() - 0.3


def own(x: torch.Tensor, collective: Collective) -> torch.Tensor:
    return x.chunk(collective.mesh.replicas)[collective.mesh.replica].contiguous()


def new_group(collective: Collective, engine: str, steps: int, saes) -> TrainingGroup:
    target = TargetSide(D_OUT, Normalisation(1.0)) if saes is TRANSCODERS else None
    return TrainingGroup(saes, D_IN, Normalisation(2.0), steps, "cpu", engine, collective, target)


def trained(collective: Collective, engine: str, steps: int = STEPS, saes=SAES) -> tuple[TrainingGroup, list[list[float]]]:
    group, seen = new_group(collective, engine, steps, saes), []
    for step in range(steps):
        losses = group.step(own(rows(step), collective), own(targets(step), collective) if saes is TRANSCODERS else None)
        seen.append([value.item() for loss in losses for value in (loss.reconstruction, loss.l0, loss.pairs)])
    return group, seen


def whole(groups: list[TrainingGroup], name: str) -> torch.Tensor:
    """A tensor of the SAEs that shards hold together."""
    axis, _ = groups[0].latents_of(name)
    parts = [group.tensors()[name] for group in groups if group.collective.mesh.replica == 0]
    return parts[0] if axis is None else torch.cat(parts, axis)


@pytest.mark.parametrize("saes", [SAES, TRANSCODERS], ids=["saes", "transcoders"])
@pytest.mark.parametrize("engine", ["pairs", "dense"])
@pytest.mark.parametrize(("shards", "replicas"), MESHES)
def test_many_ranks_step_as_one(in_threads, engine, shards, replicas, saes):
    alone, losses = trained(ALONE, engine, saes=saes)
    start = new_group(ALONE, engine, STEPS, saes)
    done = in_threads(lambda collective: trained(collective, engine, saes=saes), shards, replicas)
    groups = [group for group, _ in done]
    for _, seen in done:
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(losses), rtol=1e-5, atol=1e-6)
    for name, tensor in alone.tensors().items():
        if name.rpartition(".")[2] in (*TENSORS, "w_skip"):
            apart, moved = (whole(groups, name) - tensor).norm(), (tensor - start.tensors()[name]).norm()
            assert apart <= TOLERANCE * moved, (name, (apart / moved).item())
        elif name.endswith("last_fired"):
            assert torch.equal(whole(groups, name), tensor)


@pytest.mark.parametrize("saes", [SAES, TRANSCODERS], ids=["saes", "transcoders"])
@pytest.mark.parametrize("engine", ["pairs", "dense"])
def test_what_ranks_hold_in_common_is_the_same_bits(in_threads, engine, saes):
    groups = [group for group, _ in in_threads(lambda collective: trained(collective, engine, saes=saes), 2, 2)]
    for group in groups:
        twin = groups[group.collective.mesh.shard]  # the first replica of the same shard
        for name, tensor in group.tensors().items():
            other = twin if group.latents_of(name)[0] is not None else groups[0]
            assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), *MESHES])
@pytest.mark.parametrize("config", [*SAES, *TRANSCODERS])
def test_shared_gradients_are_those_of_the_whole_loss(in_threads, config, shards, replicas):
    x, y, step, d_out = rows(0).double() / 2, targets(0).double(), 3, D_OUT if config in TRANSCODERS else None
    sae = new_sae(config, D_IN, d_out=d_out)
    held_whole = ("b_dec", *(["w_skip"] if config.skip else []))
    for name in held_whole:
        sae.parameters[name].normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    p = {name: tensor.double() for name, tensor in sae.parameters.items()}
    coefficient = config.sparsity_weight * (min(1, step / 5) if config.preset.sparsity_warmup_steps else 1)
    want = loss_gradients(
        x,
        **p,
        target=y if d_out else x,
        is_transcoder=d_out is not None,
        penalty=lambda rates: penalty(config, coefficient, rates),
        bandwidth=config.preset.bandwidth,
        prefixes=config.prefixes,
    )

    def gradients(collective: Collective):
        part = new_sae(config, D_IN, latents=collective.mesh.latents(config.width), d_out=d_out)
        for name in held_whole:
            part.parameters[name].copy_(sae.parameters[name])
        for name, tensor in part.parameters.items():
            part.parameters[name] = tensor.double()
        return shared_gradients(part, own(x, collective), step, collective, own(y if d_out else x, collective))[0]

    got = in_threads(gradients, shards, replicas)
    for name, axis in {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "fired": 0}.items():
        together = torch.cat([getattr(each, name) for each in got[:shards]], axis)
        torch.testing.assert_close(together, getattr(want, name), rtol=1e-9, atol=1e-12)
    for each in got:
        for name in held_whole:
            torch.testing.assert_close(getattr(each, name), getattr(want, name), rtol=1e-9, atol=1e-12)
        for name in ("reconstruction_loss", "l0", "pairs"):
            torch.testing.assert_close(getattr(each, name), getattr(want, name), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("config", "d_out"), [(SAES[1], None), (TRANSCODERS[1], D_OUT)])
@pytest.mark.parametrize(("shards", "replicas"), MESHES)
def test_a_warm_start_takes_all_rows_and_all_latents(in_threads, shards, replicas, config, d_out):
    x, y = rows(3), targets(3)
    want = new_sae(config, D_IN, d_out=d_out)
    warm_start(want, x, target=y if d_out else None)

    def started(collective: Collective) -> dict[str, torch.Tensor]:
        sae = new_sae(config, D_IN, latents=collective.mesh.latents(config.width), d_out=d_out)
        warm_start(sae, own(x, collective), collective, own(y, collective) if d_out else None)
        return sae.parameters

    for parameters in in_threads(started, shards, replicas):
        assert torch.equal(parameters["b_dec"], want.parameters["b_dec"])
        torch.testing.assert_close(
            parameters["threshold"], want.parameters["threshold"][: len(parameters["threshold"])], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("parts", [1, 2, 5, 61])
def test_shards_draw_the_whole_saes_parameters(monkeypatch, parts):
    monkeypatch.setattr("everyscope.sae.trainable.SKIPPED", 100)
    config = SAES[1]
    sae = new_sae(config, D_IN)
    pieces = [new_sae(config, D_IN, latents=range(61 * part // parts, 61 * (part + 1) // parts)) for part in range(parts)]
    for name, axis in {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0}.items():
        assert torch.equal(torch.cat([piece.parameters[name] for piece in pieces], axis), sae.parameters[name])
    assert all(piece.parameters["W_enc"].T.is_contiguous() for piece in pieces)
    nested = [new_sae(SAES[2], D_IN, latents=latents).prefixes for latents in (range(4), range(4, 30), range(30, 50))]
    assert nested == [(4, 4, 4), (1, 21, 26), (0, 0, 20)]


def test_a_crowded_shard_does_not_send_all_to_and_fro(in_threads, monkeypatch):
    """The first latents fire on every row, so that their shard alone is full of pairs: all step densely, and stay with it."""
    monkeypatch.setattr(pairs_cpu, "PAIRS_SHARE", 0.3)
    monkeypatch.setattr(pairs_cpu, "DENSE_SHARE", 0.4)
    config = SaeConfig(width=64, sparsity_coefficient=0, preset=SaePreset(bandwidth=0.01, initial_threshold=1.0, **FIXED))
    tries = []

    def work(collective: Collective) -> list[bool]:
        group = TrainingGroup([config], D_IN, Normalisation(2.0), 9, "cpu", "pairs", collective)
        first = group.saes[0].first
        group.saes[0].parameters["b_enc"][: max(0, 9 - first)] = 50.0
        uses = []
        for step in range(4):
            tries.append(bool(group.tensors()["engine.uses_pairs"][0]))
            group.step(own(rows(step), collective))
            uses.append(bool(group.tensors()["engine.uses_pairs"][0]))
        return uses

    assert in_threads(work, 4, 1) == [[False] * 4] * 4
    assert sum(tries) == 4  # each rank once
    assert in_threads(work, 1, 1) == [[True] * 4]


@pytest.mark.parametrize(("shards", "replicas"), MESHES)
def test_bytes_summed_are_those_of_the_formula(in_threads, shards, replicas):
    """Per step and SAE: errors and counts over shards; counts, gradients of latents with pairs, and b_dec's over replicas."""
    config = SaeConfig(width=60, sparsity_coefficient=0, preset=SaePreset(bandwidth=0.01, initial_threshold=0.8, **FIXED))
    group_of = {}

    def work(collective: Any) -> dict[str, int]:
        group = TrainingGroup([config], D_IN, Normalisation(2.0), 9, "cpu", "pairs", collective)
        group.step(own(rows(0), collective))
        group_of[collective.mesh.rank] = group
        return collective.bytes_reduced

    for rank, got in enumerate(in_threads(work, shards, replicas)):
        group = group_of[rank]
        assert group.tensors()["engine.uses_pairs"]
        width, moving = group.saes[0].width, int((group.saes[0].touched > 0).sum())
        over_shards = 4 * (ROWS // replicas * D_IN + 1) + 8 * 3 + 4 * D_IN
        over_replicas = 8 * (2 * width + 2) + 4 * (moving * (2 * D_IN + 2) + D_IN)
        assert got == {"shards": over_shards * (shards > 1), "replicas": over_replicas * (replicas > 1), "all": 0}
