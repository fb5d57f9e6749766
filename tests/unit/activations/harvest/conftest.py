"""A small corpus, and a stand-in for the model whose activations can be told from the token ids."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.model_handle import Capture, ModelHandle
from everyscope.activations.harvest.run import HarvestResult, harvest
from everyscope.sites.config import ModelConfig
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig
from everyscope.text.tokenizer import load_tokenizer

CONTEXT = 32
WIDTHS = {Site("attn_out", 0): 6, Site("resid_post", 0): 4, Site("resid_post", 1): 4}


def activations_of(site: Site, input_ids: Tensor) -> Tensor:
    """Distinct for each site, position and id, exact in bfloat16: [batch ctx d_in]."""
    place = list(WIDTHS).index(site)
    position = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
    columns = [input_ids % 128, input_ids // 128, position, torch.full_like(input_ids, place)]
    return torch.stack((columns * 2)[: WIDTHS[site]], dim=-1).float()


class StandIn:
    """A model that counts how often it is loaded and run."""

    def __init__(self) -> None:
        self.loads, self.passes = 0, 0
        self.capture: Capture = self.activations

    def activations(self, sites: tuple[Site, ...], input_ids: Tensor) -> dict[Site, Tensor]:
        self.passes += 1
        return {site: activations_of(site, input_ids) for site in sites}

    def open(self) -> Capture:
        self.loads += 1
        return self.capture


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short documents, some of them shorter than a block and some longer."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        lines = [f"def function_{number}_{line}(x): return x + {line * number}" for line in range(1 + number % 7)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> HarvestConfig:
    """All of the corpus in several buckets."""
    return HarvestConfig(
        model=ModelConfig(name="stand-in"),
        text=TextConfig(source="files", paths=(corpus,), context=CONTEXT, held_out_fraction=0.2),
        sites=tuple(WIDTHS),
        num_tokens=10**6,
        bucket_rows=500,
        batch_blocks=3,
        out=tmp_path / "shards",
    )


@pytest.fixture
def model() -> StandIn:
    return StandIn()


@pytest.fixture
def reap(tokenizer, model: StandIn) -> Callable[..., HarvestResult]:
    """Harvest with the stand-in: `reap(config)`, with fields to change as keywords."""

    def harvest_it(config: HarvestConfig, identity: str = "stand-in", **changes) -> HarvestResult:
        config = HarvestConfig.model_validate({**dict(config), **changes})
        return harvest(config, identity, lambda config: ModelHandle({s: WIDTHS[s] for s in config.sites}, tokenizer, model.open))

    return harvest_it


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
