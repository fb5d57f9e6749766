"""Work that is divided into jobs comes to the bytes of work that is not."""

import json
import os
import signal
from pathlib import Path

import pytest
from small_scope import build_scope, tree_bytes

from everyscope.activations.harvest.run import run as harvest
from everyscope.evaluate.run import run as evaluate
from everyscope.run.activation_servers import served
from everyscope.run.find import RECIPES, find_recipe
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job, Resources, config_of, spec_of
from everyscope.run.jobs.processes import Processes
from everyscope.run.jobs.runner import LocalRunner
from everyscope.run.jobs.schedule import Schedule
from everyscope.run.placement import Devices
from everyscope.run.stage_jobs import evaluation_jobs, gather_scores, harvest_jobs, train_jobs
from everyscope.sae.config import SaeConfig
from everyscope.sae.presets import fast
from everyscope.sites.names import Site
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.run import run as train

COSTS = "cost.json"


def scores(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree_bytes(folder).items() if not name.endswith(COSTS)}


@pytest.mark.parametrize("count", [3, 99])
def test_an_evaluation_in_parts_finds_what_one_finds(tmp_path, count):
    config = build_scope(tmp_path)
    evaluate(config)
    parted = config.model_copy(update={"out": tmp_path / "parted"})
    jobs = evaluation_jobs(parted, count, Resources(), "evaluate")
    assert len(jobs) == min(count, 7)
    LocalRunner().run(jobs[1:], "evaluate")
    gather_scores(parted.out)  # as after a kill
    LocalRunner().run(evaluation_jobs(parted, count, Resources(), "evaluate"), "evaluate")
    gather_scores(parted.out)
    assert scores(parted.out) == scores(config.out)
    whole, parts = (json.loads((out / COSTS).read_text())["forwards"] for out in (config.out, parted.out))
    assert parts["spliced"] == whole["spliced"]
    assert parts["clean"] > whole["clean"]
    assert evaluation_jobs(parted, 1, Resources(), "evaluate")[0].config == parted


@pytest.mark.parametrize("count", [1, 3, 99])
def test_a_harvest_in_parts_writes_what_one_writes(tmp_path, tiny_random_model_folder, count):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("\n".join(f"value_{number}_{line} = {line}" for line in range(12)))
    recipe = find_recipe("tiny")
    changes = {
        "model": recipe.model.model_copy(update={"name": str(tiny_random_model_folder)}),
        "text": recipe.text.model_copy(
            update={
                "source": "files",
                "paths": tuple(tmp_path / f"{number}.txt" for number in range(6)),
                "context": 64,
                "held_out_fraction": 0.01,
            }
        ),
        "sites": recipe.harvest_config(tmp_path).sites[:2],
        "num_tokens": 900,
        "bucket_rows": 200,
    }
    config = recipe.harvest_config(tmp_path / "one").model_copy(update=changes)
    harvest(config)
    parted = config.model_copy(update={"out": tmp_path / "parted"})
    jobs = harvest_jobs(parted, count, Resources(), "harvest")
    assert len(jobs) == min(count, 5)
    LocalRunner().run(jobs, "harvest")
    assert harvest_jobs(parted, count, Resources(), "harvest") == []
    assert tree_bytes(parted.out) == tree_bytes(config.out)


@pytest.mark.parametrize("name", RECIPES)
def test_every_config_of_a_recipe_goes_to_other_processes_and_comes_back(name, tmp_path):
    config = find_recipe(name)
    configs = [
        config.harvest_config(tmp_path),
        config.evaluate_config(tmp_path),
        config.describe_config(tmp_path),
        config.explain_config(tmp_path),
        *config.comparison_configs(tmp_path),
        *config.train_configs(tmp_path),
    ]
    for one in configs:
        spec = spec_of(Job(harvest, one, "job"), None)
        assert config_of(type(spec).model_validate_json(spec.model_dump_json())) == one


def test_groups_share_a_device_by_their_memory_and_longer_ones_begin_first(tmp_path):
    config = find_recipe("gemma_2_2b")
    on_gpu = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    groups = on_gpu.train_configs(tmp_path)
    shares = {}
    for gib in (400, 600, 1000):  # none has to be cut
        devices = Devices(gib << 30, 8)
        engine = EngineConfig(engine="ray", device_bytes=devices.memory_bytes)
        jobs = train_jobs(groups, lambda group: config.shape.d_in(group.site), engine, devices)
        assert len({job.name for job in jobs}) == len(groups)
        shares[gib] = [job.resources.gpus for job in jobs]
        assert all(0 < share <= 0.5 or share == 1 for share in shares[gib])
    assert all(small >= large for small, large in zip(shares[400], shares[1000], strict=True))
    assert min(shares[1000]) <= 0.5
    widest = max(jobs, key=lambda job: job.cost)
    assert max(sae.width for sae in widest.config.saes) == max(sae.width for group in groups for sae in group.saes)


def test_groups_find_their_server_and_train_to_the_same_bits(tmp_path):
    """The server is lost once, while training groups train from it."""
    build_scope(tmp_path / "scope")
    sites = (Site("resid_post", 0), Site("mlp_out", 1))
    settings = TrainSettings(batch_rows=16, checkpoint_steps=50, log_steps=50)
    saes = (SaeConfig(width=24, target_l0=4, preset=fast(d_in=16)),)

    def groups(out: Path) -> list[TrainConfig]:
        shards = tmp_path / "scope/shards"
        return [
            TrainConfig(
                site=site, shards=shards / site.folder, saes=saes, num_tokens=8000, settings=settings, out=out / site.folder
            )
            for site in sites
        ]

    for group in groups(tmp_path / "direct"):
        train(group)
    jobs = served(train_jobs(groups(tmp_path / "served"), lambda group: 16, EngineConfig(engine="ray")), EngineConfig(), tmp_path)
    assert [job.name for job in jobs if job.is_service] == ["server 1/1"]
    told: list[dict] = []

    def watch(event: dict) -> None:
        told.append(event)
        if event["event"] == "started" and event["job"] == "server 1/1" and event["attempt"] == 1:
            os.kill(event["pid"], signal.SIGKILL)

    place = Processes(3, [], tmp_path)
    try:
        Schedule(place, watch, 5).run(jobs)
    finally:
        place.close()
    assert {event["job"] for event in told if event["event"] == "retry"} >= {"server 1/1"}
    served_bytes, direct_bytes = (
        {name: content for name, content in tree_bytes(tmp_path / kind).items() if not name.endswith(".speed.json")}
        for kind in ("served", "direct")
    )
    assert served_bytes == direct_bytes
    assert not list(tmp_path.glob("*.address"))
