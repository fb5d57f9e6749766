"""What a recipe costs, before anything is spent: SAEs, tokens, bytes on disk, operations, hours of every stage. Torch-free."""

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count
from everyscope.run.cost.prices import (
    Rates,
    StagePrice,
    depth_of,
    pass_flop,
    stage_prices,
    train_flop,
)
from everyscope.run.cost.storage import Rate, SiteDemand, StoragePlan, duration, storage_plan
from everyscope.run.stages import Stages
from everyscope.sites.names import Site, places_of
from everyscope.suite.layout import width_label

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
LONG_SECONDS = 30 * 86400.0
"""A plan for this machine that takes longer mentions clusters [s]."""


@dataclass(frozen=True)
class PlannedSae:
    """One SAE of the plan."""

    site: Site
    width: int
    sparsity_coefficient: float | None
    target_l0: float | None
    seed: int
    num_tokens: int
    parameter_bytes: int
    """Size of its float32 weights, once [bytes]."""
    flop: float
    """Its training [operations]."""


@dataclass(frozen=True)
class Plan:
    """A recipe's price."""

    name: str
    saes: tuple[PlannedSae, ...]
    tokens_of: dict[Site, int]
    bytes_of: dict[Site, int]
    """Shards on disk, per site, in the recipe's number format [bytes]."""
    dtype: str
    harvest_flop: float
    flop_per_second: float
    """Sustained rate that the hours rest on [operations/s]."""
    rate_origin: str
    stages: tuple[StagePrice, ...]
    """How long each stage takes."""
    storage: StoragePlan
    """Whether shards or a live model suit the recipe and this machine."""

    @property
    def shard_bytes(self) -> int:
        """All shards together [bytes]."""
        return sum(self.bytes_of.values())

    @property
    def train_flop(self) -> float:
        """Training all SAEs [operations]."""
        return sum(sae.flop for sae in self.saes)

    @property
    def num_latents(self) -> int:
        """Latents of all SAEs."""
        return sum(sae.width for sae in self.saes)

    def hours(self, flop: float) -> float:
        """Time for so many operations at the plan's rate [hours]."""
        return flop / self.flop_per_second / 3600


def plan(stages: Stages, rates: Rates, *, disk_gbps: float | None = None, model_tokens_per_second: float | None = None) -> Plan:
    """Price a run by what this machine sustains.

    `disk_gbps` [10^9 bytes/s], None measures the disk of the run's folder; `model_tokens_per_second` [tokens/s], None divides the
    harvest's operations by the rate.
    """
    config, size = stages.config, NUMBER_BYTES[stages.config.harvest.dtype]
    most = max(config.tokens_of(site) for site in config.all_places)  # one pass of the model writes every site
    tokens = dict.fromkeys(config.all_places, most)
    saes = planned_saes(stages)
    depth = max(depth_of(site) for site in config.all_places)
    flop_per_token = pass_flop(config.sizes, 0, depth, logits=False)
    model = Rate(rates.model / max(1.0, flop_per_token), rates.origin)
    if model_tokens_per_second is not None:
        model = Rate(model_tokens_per_second, "given")
    training_groups = {(sae.site, sae.num_tokens) for sae in saes}
    demands = [
        SiteDemand(
            config.sizes.d_in(site) * size,
            rows,
            tuple(trained for other, trained in sorted(training_groups, key=str) if site in places_of([other])),
        )
        for site, rows in tokens.items()
    ]
    training = sum(sae.flop for sae in saes) / rates.saes
    return Plan(
        name=config.name,
        saes=tuple(saes),
        tokens_of=tokens,
        bytes_of={site: rows * config.sizes.d_in(site) * size for site, rows in tokens.items()},
        dtype=config.harvest.dtype,
        harvest_flop=flop_per_token * max(tokens.values()),
        flop_per_second=rates.saes,
        rate_origin=rates.origin,
        stages=tuple(stage_prices(stages, rates)),
        storage=storage_plan(demands, training, model, stages.out, disk_gbps),
    )


def planned_saes(stages: Stages) -> list[PlannedSae]:
    """Every SAE of the run itself, by group and site."""
    config = stages.config
    return [
        PlannedSae(
            site=site,
            width=sae.width,
            sparsity_coefficient=sae.sparsity_coefficient,
            target_l0=sae.target_l0,
            seed=sae.seed,
            num_tokens=group.num_tokens,
            parameter_bytes=4 * (2 * d_in * sae.width + 2 * sae.width + d_in),
            flop=train_flop(stages.parts[0], site, group.num_tokens, sae.width),
        )
        for group in config.groups
        for site in config.sites(group)
        for d_in in (config.sizes.d_in(site),)
        for sae in config.saes_of(group, site)
    ]


def storage_options(price: Plan) -> list[tuple[str, int]]:
    """How far number format, fewer sites or no disk bring the shards down: what, bytes."""
    numbers = {site: size // NUMBER_BYTES[price.dtype] for site, size in price.bytes_of.items()}
    residual = [size for site, size in numbers.items() if site.kind == "resid_post"]
    options = [
        (f"all {len(numbers)} sites, float32", 4 * sum(numbers.values())),
        (f"all {len(numbers)} sites, bfloat16", 2 * sum(numbers.values())),
    ]
    if 0 < len(residual) < len(numbers):
        options.append((f"the {len(residual)} residual sites, bfloat16", 2 * sum(residual)))
    largest = max(numbers, key=lambda site: numbers[site])
    for site in dict.fromkeys([next((site for site in numbers if site.kind == "resid_post"), largest), largest]):
        options += [(f"one {site.kind} site, float32", 4 * numbers[site]), (f"one {site.kind} site, bfloat16", 2 * numbers[site])]
    return [*options, ("no disk, the model runs while SAEs train", 0)]


def plan_json(price: Plan) -> dict[str, Any]:
    """The plan as plain JSON values, every SAE included."""
    return {
        "name": price.name,
        "saes": [{**asdict(sae), "site": sae.site.folder} for sae in price.saes],
        "sites": [
            {"site": site.folder, "num_tokens": price.tokens_of[site], "bytes": price.bytes_of[site]} for site in price.tokens_of
        ],
        "num_saes": len(price.saes),
        "num_latents": price.num_latents,
        "dtype": price.dtype,
        "shard_bytes": price.shard_bytes,
        "storage_options": [{"what": what, "bytes": size} for what, size in storage_options(price)],
        "sae_bytes": sum(sae.parameter_bytes for sae in price.saes),
        "harvest_flop": price.harvest_flop,
        "train_flop": price.train_flop,
        "flop_per_second": price.flop_per_second,
        "rate_origin": price.rate_origin,
        "stages": [asdict(stage) for stage in price.stages],
        "hours": sum(stage.seconds for stage in price.stages) / 3600,
        "storage": price.storage.as_json(),
    }


def plan_tables(price: Plan) -> list[Table]:
    """The plan for people: a table of SAEs by site and width, one of totals, and one of disk or live."""
    saes = Table(title=f"{price.name}: {len(price.saes)} SAEs", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("site", "layers", "width", "SAEs", "tokens", "weights", "FLOP", "time"):
        saes.add_column(heading, justify="left" if heading in ("site", "layers") else "right", no_wrap=True)
    rows: dict[tuple[str, int, int], list[PlannedSae]] = {}
    for sae in price.saes:
        rows.setdefault((sae.site.kind, sae.width, sae.num_tokens), []).append(sae)
    for (kind, width, tokens), members in rows.items():
        flop = sum(sae.flop for sae in members)
        weights = human_bytes(sum(sae.parameter_bytes for sae in members))
        layers = _span(sorted({sae.site.layer for sae in members}))
        cells = (
            width_label(width),
            str(len(members)),
            human_count(tokens),
            weights,
            f"{flop:.1e}",
            duration(3600 * price.hours(flop)),
        )
        saes.add_row(kind, layers, *cells)
    totals = Table(title="Totals", title_justify="left", show_header=False, box=box.SIMPLE)
    totals.add_row("latents", human_count(price.num_latents))
    totals.add_row("SAE weights, float32", human_bytes(sum(sae.parameter_bytes for sae in price.saes)))
    totals.add_row("operations", f"harvest {price.harvest_flop:.2e}, training {price.train_flop:.2e} FLOP")
    totals.add_row("rate", f"{price.flop_per_second / 1e12:,.2f} TFLOP/s ({price.rate_origin})")
    for what, size in storage_options(price):
        totals.add_row(f"shards, {what}", human_bytes(size) if size else "none")
    return [saes, totals, stage_table(price), price.storage.table()]


def stage_table(price: Plan) -> Table:
    """How long each stage takes."""
    table = Table(title="Stages", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("stage", "of", "time"):
        table.add_column(heading, justify="right" if heading == "time" else "left")
    for stage in price.stages:
        table.add_row(stage.name, stage.what, duration(stage.seconds))
    table.add_section()
    seconds = sum(stage.seconds for stage in price.stages)
    table.add_row("all", "", duration(seconds))
    if seconds > LONG_SECONDS:
        table.caption, table.caption_justify = "on this machine; what a cluster takes: plan with --gpus 8 --gpu h100", "left"
    return table


def _span(layers: list[int]) -> str:
    """Ascending layers as text: 0-25, or 5, 12, 19 where some are left out."""
    is_whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if is_whole else ", ".join(str(layer) for layer in layers)
