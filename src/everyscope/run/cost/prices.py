"""How long each stage of a run takes, before anything is spent: operations over the rates of this machine. Torch-free.

Operations are counted from the stages' configs: passes of the language model as far as a stage needs them, encoders of SAEs,
logits. Rates are those of a product in each number format, times the share of it that such work reaches. That share is assumed,
so seconds are good to a factor of about two.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everyscope.evaluate.comparisons.config import (
    ComparisonConfig,
    PrecisionConfig,
    ProbingConfig,
    SplittingConfig,
    SubsetsConfig,
    TransferConfig,
)
from everyscope.run.config import RunConfig
from everyscope.run.settings import ModelShape
from everyscope.run.stages import ModelPart, Stages
from everyscope.sites.names import Site

FLOP_BY_PAIRS, FLOP_DENSE = 2, 10
"""Of a training step, per latent, input and row: on the CPU a step by pairs takes about as long as its one product; on a GPU
five products of two operations bound it from above [operations]."""
SUSTAINED = 0.5
"""Share of a large product's rate that forward passes, training steps and encoders reach; assumed [1]."""
LOSS_BYTES, MEMORY_RATE = 40, 5e9
"""What the losses of one pass move for each logit, and how fast; assumed [bytes], [bytes/s]."""
LABEL_SECONDS = 0.014
"""A core's time for one latent's label: the search for its rule, and its scores [s]."""
PUBLISH_RATE = 100e6
"""Weights that publishing writes in all its formats and describes; assumed [bytes/s]."""


@dataclass(frozen=True)
class Rates:
    """What this machine sustains [operations/s]."""

    model: float
    """Products in the number format of the language model."""
    saes: float
    """Products in float32, in which SAEs are trained and encode."""
    origin: str
    """Where the numbers are from, for people."""


@dataclass(frozen=True)
class StagePrice:
    """One stage, or one comparison."""

    name: str
    what: str
    """How much of what it does, for people."""
    seconds: float
    """[s]."""


def stage_prices(stages: Stages, rates: Rates) -> list[StagePrice]:
    """Every stage in the order in which a run does them."""
    prices = []
    for part in stages.parts:
        name = "" if part.config is stages.config else f" {part.config.name.removeprefix(stages.config.name + '_')}"
        tokens = part.harvest.num_tokens
        depth = max(depth_of(site) for site in part.harvest.sites)
        seconds = tokens * pass_flop(part.config.sizes, 0, depth, logits=False) / rates.model
        prices.append(StagePrice(f"harvest{name}", f"{tokens:,} tokens, {depth} layers", seconds))
    for part in stages.parts:
        name = "" if part.config is stages.config else f" {part.config.name.removeprefix(stages.config.name + '_')}"
        flop = sum(train_flop(part, group.site, group.num_tokens, sum(sae.width for sae in group.saes)) for group in part.train)
        count = sum(len(group.saes) for group in part.train)
        prices.append(StagePrice(f"train{name}", f"{count} SAEs", flop / rates.saes))
    for part in stages.parts:
        name = "" if part.config is stages.config else f" {part.config.name.removeprefix(stages.config.name + '_')}"
        blocks = part.evaluate.num_sequences
        seconds = evaluation_seconds(part, blocks, rates) + baseline_seconds(part, rates)
        prices.append(StagePrice(f"evaluate{name}", f"{blocks:,} held-out blocks", seconds))
    for comparison in stages.comparisons:
        seconds, what = comparison_seconds(comparison, stages, rates)
        name = type(comparison).__name__.removesuffix("Config").lower()
        prices.append(StagePrice(f"compare {name}", what, seconds))
    main, context = stages.parts[0], stages.config.text.context
    saes = codes(main)
    width, d_model, vocabulary = sum(width for _, width in saes), stages.config.sizes.d_model, stages.config.sizes.words
    lens = 2.0 * d_model * vocabulary * width / rates.model
    blocks = stages.describe.num_sequences
    seconds = reading_seconds(main, blocks * context, saes, rates) + lens
    prices.append(StagePrice("describe", f"{blocks:,} blocks, logit effects of {width:,} latents", seconds))
    blocks = stages.explain.num_sequences + stages.explain.num_held_out_sequences
    workers = (os.cpu_count() or 1) if stages.config.model.device == "cpu" else 1
    seconds = reading_seconds(main, blocks * context, saes, rates) + width * LABEL_SECONDS / workers
    prices.append(StagePrice("explain", f"{blocks:,} blocks, labels of {width:,} latents", seconds))
    size = sum(4 * 2 * main.config.sizes.d_in(site) * width for site, width in saes)
    prices.append(StagePrice("publish", f"{len(saes)} SAEs", size / PUBLISH_RATE))
    return prices


def stage_seconds(stages: Stages, rates: Rates) -> dict[str, float]:
    """The prices by stage of a run, whose evaluation includes the comparisons, and all models [s]."""
    seconds: dict[str, float] = {}
    for price in stage_prices(stages, rates):
        name = price.name.partition(" ")[0]
        name = "evaluate" if name == "compare" else name
        seconds[name] = seconds.get(name, 0.0) + price.seconds
    return seconds


def depth_of(site: Site) -> int:
    """Layers that run before a site is known [layers]."""
    return 0 if site.kind == "embed" else site.layer + 1


def pass_flop(shape: ModelShape, first: int, last: int, logits: bool) -> float:
    """One token through the layers from `first` up to `last`, and the unembedding if `logits` are wanted [operations]."""
    return 2.0 * (shape.in_blocks * (last - first) / shape.num_layers + (shape.d_model * shape.words if logits else 0))


def train_flop(part: ModelPart, site: Site, tokens: int, width: int) -> float:
    """Training SAEs of so many latents together [operations]."""
    settings = part.config.train
    per_row = FLOP_BY_PAIRS if settings.device == "cpu" and settings.engine != "dense" else FLOP_DENSE
    return float(per_row) * part.config.sizes.d_in(site) * width * tokens


def codes(part: ModelPart) -> list[tuple[Site, int]]:
    """Site and width of every SAE."""
    return [(group.site, sae.width) for group in part.train for sae in group.saes]


def loss_seconds(config: RunConfig, tokens: float, rates: Rates, first: int) -> float:
    """A pass from layer `first` on, with its losses [s]."""
    shape = config.sizes
    compute = tokens * pass_flop(shape, first, shape.num_layers, logits=True) / rates.model
    return compute + tokens * shape.words * LOSS_BYTES / MEMORY_RATE


def encode_seconds(config: RunConfig, tokens: float, saes: list[tuple[Site, int]], rates: Rates) -> float:
    """Encoders of the SAEs on so many tokens [s]."""
    flop = sum(2.0 * config.sizes.d_in(site) * width for site, width in saes)
    return tokens * flop / rates.saes


def reading_seconds(part: ModelPart, tokens: float, saes: list[tuple[Site, int]], rates: Rates) -> float:
    """One pass of the model up to the last site, and all encoders [s]."""
    depth = max(depth_of(site) for site, _ in saes)
    compute = tokens * pass_flop(part.config.sizes, 0, depth, logits=False) / rates.model
    return compute + encode_seconds(part.config, tokens, saes, rates)


def evaluation_seconds(part: ModelPart, blocks: int, rates: Rates) -> float:
    """A clean pass, one from its layer on for each SAE, and the encoders [s]."""
    config, saes = part.config, codes(part)
    tokens = float(blocks * config.text.context)
    spliced = sum(loss_seconds(config, tokens, rates, depth_of(site)) for site, _ in saes)
    return loss_seconds(config, tokens, rates, 0) + spliced + encode_seconds(config, tokens, saes, rates)


def baseline_seconds(part: ModelPart, rates: Rates) -> float:
    """Three baselines of each SAE's L0, and two ablations of each site, on the baselines' blocks [s]."""
    tokens = float(part.evaluate.baseline_blocks * part.config.text.context)
    spliced = [site for site, _ in codes(part) for _ in range(3)] + [site for site in part.config.all_sites for _ in range(2)]
    return sum(loss_seconds(part.config, tokens, rates, depth_of(site)) for site in spliced)


def comparison_seconds(comparison: ComparisonConfig, stages: Stages, rates: Rates) -> tuple[float, str]:
    """One comparison over the suite: seconds, and how much it reads."""
    main, context = stages.parts[0], stages.config.text.context
    blocks = getattr(comparison, "num_sequences", None) or main.evaluate.num_sequences
    saes = codes(main)
    candidates: dict[type, Callable[[Any], tuple[float, str]]] = {
        SplittingConfig: lambda one: (reading_seconds(main, blocks * context, saes, rates), f"{blocks:,} blocks"),
        SubsetsConfig: lambda one: (
            len(one.subsets) * evaluation_seconds(main, blocks, rates),
            f"{blocks:,} blocks of each of {len(one.subsets)} corpora",
        ),
        PrecisionConfig: lambda one: (
            len(one.pairs) * evaluation_seconds(main, blocks, rates),
            f"{blocks:,} blocks in each of {len(one.pairs)} formats",
        ),
        ProbingConfig: lambda one: (
            reading_seconds(main, one.train_tokens + one.test_tokens, saes, rates),
            f"{one.train_tokens + one.test_tokens:,} tokens",
        ),
        TransferConfig: lambda one: (2 * evaluation_seconds(main, blocks, rates), f"{blocks:,} blocks"),
    }
    return candidates.get(type(comparison), lambda one: (0.0, "from the scores alone"))(comparison)
