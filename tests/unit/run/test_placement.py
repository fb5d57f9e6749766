"""Training groups cut to invented GPUs: every SAE once, nothing that does not fit, and a refusal with numbers and a way out."""

import random
from pathlib import Path

import pytest

from everyscope.base.errors import ConfigError
from everyscope.run.find import find_recipe
from everyscope.run.placement import Devices, group_work, placed
from everyscope.run.stages import stages_of
from everyscope.sae.config import SaeConfig
from everyscope.sites.names import Site
from everyscope.train.config import TrainConfig, TrainSettings, sae_name
from everyscope.train.memory import bytes_of

GIB = 2**30
H100 = Devices(80 * GIB, per_host=8)


def group(widths, d_in=256, tokens=10**6, batch=1024, layer=0, **settings) -> TrainConfig:
    return TrainConfig(
        site=Site("resid_post", layer),
        shards=Path("shards"),
        saes=tuple(SaeConfig(width=width, sparsity_coefficient=1.0, seed=seed) for seed, width in enumerate(widths)),
        num_tokens=tokens,
        settings=TrainSettings(device="cuda", batch_rows=batch, **settings),
        out=Path("train"),
    )


def some_groups(seed: int) -> list[TrainConfig]:
    rng = random.Random(seed)
    return [
        group(
            [2 ** rng.randint(9, 17) for _ in range(rng.randint(1, 6))],
            tokens=rng.randint(10**6, 10**7),
            layer=number,
            replicas=rng.choice([1, 1, 2]),
        )
        for number in range(rng.randint(1, 12))
    ]


def saes_of(groups) -> list[tuple[str, int, str]]:
    return sorted((str(one.site), one.num_tokens, sae_name(sae)) for one in groups for sae in one.saes)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [None, 4, 7, 64])
@pytest.mark.parametrize("mib", [3500, 6000, 80_000])
def test_every_sae_is_trained_once_and_every_group_fits(seed, count, mib):
    groups, devices = some_groups(seed), Devices(mib << 20, 4, count)
    cut = placed(groups, lambda one: 256, devices)
    assert saes_of(cut) == saes_of(groups)
    assert all(bytes_of(one, 256) <= devices.usable_bytes for one in cut)
    assert all(one.settings.ranks <= 4 for one in cut)
    assert len({one.group_id for one in cut}) == len(cut)
    whole = [one for one in groups if bytes_of(one, 256) <= devices.usable_bytes]
    if count is None:
        assert all(one in cut for one in whole)  # what fits stays as it is


@pytest.mark.parametrize("seed", range(8))
def test_no_group_that_could_be_divided_keeps_all_gpus_waiting(seed):
    groups = some_groups(seed)
    cut = placed(groups, lambda one: 256, Devices(80 * GIB, 8, 32))
    total = sum(group_work(one, 256) * one.settings.ranks for one in cut)
    for one in cut:
        narrow = one.saes[0].width // (2 * one.settings.latent_shards) < 2**12
        assert group_work(one, 256) <= total / 32 or (len(one.saes) == 1 and (narrow or one.settings.ranks == 8))


def test_groups_on_the_cpu_and_unknown_gpus_are_left_alone():
    on_cpu = group([2**18] * 3).model_copy(update={"settings": TrainSettings(batch_rows=1024)})
    assert placed([on_cpu], lambda one: 256, Devices(1 << 30, 1)) == [on_cpu]
    assert placed([group([2**18] * 3)], lambda one: 256, None) == [group([2**18] * 3)]


def test_the_largest_saes_of_gemma_2_2b_are_refused_on_one_gpu_with_numbers_and_a_way_out():
    with pytest.raises(ConfigError) as caught:
        stages_of(find_recipe("gemma_2_2b"), Path("run"), Devices(80 * GIB, 1))
    said = str(caught.value)
    assert "resid_post layer 5: one SAE of width 1048576 needs 90.8" in said
    assert "of 80.0 GiB (1 on a host)" in said
    assert "a host with 2 GPUs (45.8 GiB on each)" in said
    assert "\n" not in said


def test_what_is_said_to_fit_fits():
    wide = group([2**18], d_in=2304, batch=8192)
    small = Devices(24 * GIB, 1)
    with pytest.raises(ConfigError, match=r"set --train.batch-rows 2048 \(19.6 GiB\)"):
        placed([wide], lambda one: 2304, small)
    placed([wide.model_copy(update={"settings": TrainSettings(device="cuda", batch_rows=2048)})], lambda one: 2304, small)
    with pytest.raises(ConfigError, match="batch-rows"):
        placed([wide.model_copy(update={"settings": TrainSettings(device="cuda", batch_rows=4096)})], lambda one: 2304, small)


def test_gemma_2_2b_on_eight_gpus_is_split_and_sharded_to_fit():
    config = find_recipe("gemma_2_2b")
    stages, usual = stages_of(config, Path("run"), H100), stages_of(config, Path("run"))
    assert saes_of(stages.groups) == saes_of(usual.groups)
    assert all(bytes_of(one, stages.d_in(one)) <= H100.usable_bytes for one in stages.groups)
    widest = [one for one in stages.groups if one.saes[0].width == 2**20]
    assert {one.site.layer for one in widest} == {5, 12, 19}
    assert {one.settings.latent_shards for one in widest} == {2}
    changed = [one for one in stages.groups if one not in usual.groups]
    assert {one.site.layer for one in changed} == {5, 12, 19}  # layer 12 has the other wide ones too


def test_an_sae_is_the_same_in_whatever_group_it_trains():
    together = group([64, 128, 256])
    alone = [together.model_copy(update={"saes": (sae,)}) for sae in together.saes]
    for one in alone:
        assert one.group_id != together.group_id
        assert one.identity_of(one.saes[0], "rows") == together.identity_of(one.saes[0], "rows")
    sae = together.saes[0]
    others = [
        together.identity_of(sae, "other rows"),
        together.identity_of(together.saes[1], "rows"),
        together.model_copy(update={"num_tokens": 10**7}).identity_of(sae, "rows"),
        together.model_copy(update={"max_norm": None}).identity_of(sae, "rows"),
    ]
    assert together.identity_of(sae, "rows") not in others
    assert len(set(others)) == len(others)
