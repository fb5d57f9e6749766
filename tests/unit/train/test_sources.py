"""A training group trains to the same bits wherever its rows come from: a live server, memory, or the journal of what it took."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.live import LiveHarvest
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.live import LiveOrigin
from everyscope.activations.serve.run import Serving, serving
from everyscope.activations.stream.addresses import opened
from everyscope.activations.stream.local import stretches
from everyscope.base.ids import content_id
from everyscope.run.find import find_recipe
from everyscope.sae.config import SaeConfig, SaePreset
from everyscope.sae.files import read_sae
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig
from everyscope.train.config import TrainConfig, TrainSettings, sae_name
from everyscope.train.run import is_finished, run, train

pytestmark = pytest.mark.usefixtures("forked_interpreters")

SITE = Site("resid_post", 1)
RECIPE = SaePreset(
    learning_rate=1e-2, learning_rate_warmup_steps=3, sparsity_warmup_steps=6, bandwidth=0.1, initial_threshold=0.1
)
STEPS, BATCH_ROWS = 30, 32


class Counted(LiveHarvest):
    """Counts how often the model makes each bucket."""

    made: Counter[int]

    def rows(self, bucket: int) -> dict[str, np.ndarray]:
        self.made[bucket] += 1
        return super().rows(bucket)


class InMemory:
    """All rows of a live harvest, and its statistics."""

    def __init__(self, buckets: LiveHarvest) -> None:
        rows = np.concatenate([buckets.rows(number)[SITE.folder] for number in range(len(buckets.borders) - 1)])
        self.rows, self.statistics = torch.from_numpy(rows), buckets.statistics[SITE.folder]
        self.num_rows, self.d_in = self.rows.shape
        self.identity = content_id(["in memory", buckets.identity])

    def batch(self, step: int, rows: int) -> torch.Tensor:
        parts = [self.rows[start:stop] for start, stop in stretches(step * rows, (step + 1) * rows, self.num_rows)]
        return torch.cat(parts)


@pytest.fixture(scope="module")
def buckets(tiny_random_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    folder = tmp_path_factory.mktemp("live")
    for number in range(20):
        (folder / f"{number}.txt").write_text("\n".join(f"x_{number} = {number} * {line} + {line**2}" for line in range(12)))
    config = HarvestConfig(
        model=ModelConfig(name=str(tiny_random_model_folder)),
        text=TextConfig(source="files", paths=(folder,), context=32, held_out_fraction=0.2),
        sites=(Site("resid_post", 0), SITE),
        num_tokens=750,
        bucket_rows=200,
        batch_blocks=4,
        out=folder / "out",
    )
    return Counted(config)


@pytest.fixture
def server(buckets: Counted, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """A live server whose buffer holds a whole epoch of all sites."""
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    buckets.made = Counter()
    config = ServeConfig(
        shards=Path("live"), listen="127.0.0.1:0", chunk_rows=64, wait_seconds=0.5, hold_seconds=60.0, drain_seconds=10
    )
    with serving(config, LiveOrigin(buckets, config)) as server:
        yield server


def group(server: Serving, out: Path, width: int = 32, **changes) -> TrainConfig:
    """A training group of two SAEs that sees more rows than there are."""
    fields = {
        "site": SITE,
        "shards": out / "none",
        "source": f"flight://127.0.0.1:{server.port}/{SITE.folder}",
        "saes": tuple(SaeConfig(width=width, sparsity_coefficient=c, preset=RECIPE) for c in (1e-3, 1e-2)),
        "num_tokens": STEPS * BATCH_ROWS,
        "settings": TrainSettings(batch_rows=BATCH_ROWS, checkpoint_steps=4, engine="dense"),
        "out": out,
    }
    return TrainConfig(**(fields | changes))


def weights(config: TrainConfig) -> list[torch.Tensor]:
    saes = [read_sae(config.out / sae_name(sae))[0] for sae in config.saes]
    return [tensor for sae in saes for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def trained_in_memory(config: TrainConfig, buckets: LiveHarvest, out: Path) -> list[torch.Tensor]:
    alone = config.model_copy(update={"out": out})
    train(alone, InMemory(buckets), lambda steps: None)
    return weights(alone)


def test_a_live_server_in_fixed_order_trains_the_bits_of_rows_in_memory(server, buckets, tmp_path):
    config = group(server, tmp_path / "live")
    assert config.num_tokens > buckets.borders[-1], "training goes on into a second epoch"
    run(config)
    assert set(buckets.made.values()) == {1}, "the second epoch came from the buffer"
    assert same(weights(config), trained_in_memory(config, buckets, tmp_path / "memory"))


def stop_after(steps: int):
    def progress(done: int) -> None:
        nonlocal steps
        steps -= done
        if steps < 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("order", ["fixed", "any"])
def test_a_group_that_is_stopped_goes_on_from_the_server_to_the_same_bits(server, tmp_path, order):
    config = group(server, tmp_path / "group", order=order)
    for steps in (5, 13):
        with pytest.raises(KeyboardInterrupt):
            run(config, stop_after(steps))
        assert not is_finished(config)
    run(config)
    assert is_finished(config)
    again = config.model_copy(update={"out": tmp_path / "again"})
    journal = tmp_path / "group" / f"group_{config.group_id}.journal"
    assert journal.exists() == (order == "any")
    with opened(str(config.source), journal=journal if order == "any" else None, trainer="again") as source:
        train(again, source, lambda steps: None)
    assert same(weights(config), weights(again))
    before = weights(config)
    run(config)
    assert same(weights(config), before)


def test_three_processes_with_different_groups_share_one_run_of_the_model(server, buckets, tmp_path):
    configs = [group(server, tmp_path / "groups", width) for width in (16, 32, 48)]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(config,)) for config in configs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert set(buckets.made.values()) == {1}
    counts = server.buffer.report()["sites"][SITE.folder]
    assert counts["chunks_read"] == -(-buckets.borders[-1] // 64)
    assert counts["amortisation"] >= 3
    for config in configs:
        assert same(weights(config), trained_in_memory(config, buckets, tmp_path / f"memory_{config.saes[0].width}"))


def test_a_recipe_gives_each_site_its_address_and_the_rest_stays_as_it_is(tmp_path):
    recipe = find_recipe("tiny")
    plain = recipe.train_configs(tmp_path)
    served = recipe.train_configs(tmp_path, "flight://10.0.0.1:8815/", "any", tmp_path / "roots.pem")
    assert [config.source for config in plain] == [None] * len(plain)
    assert [config.source for config in served] == [f"flight://10.0.0.1:8815/{config.site.folder}" for config in served]
    assert [config.group_id for config in served] == [config.group_id for config in plain]
    assert [config.record() for config in served] == [config.record() for config in plain]


def test_any_order_is_for_servers(server, tmp_path):
    for source in (None, "s3://bucket/resid_post/layer_1"):
        with pytest.raises(ValidationError, match="only servers have it"):
            group(server, tmp_path, source=source, order="any")
