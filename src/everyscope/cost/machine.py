"""What a recipe costs, before anything is spent: SAEs, tokens, bytes on disk, operations, hours. Torch-free.

Operations of training are, per latent, input and row: on a GPU those of a dense step, ten (five products of two operations each),
which is an upper bound; on the CPU two, for there a step by pairs takes about as long as its one product does in float32
(benchmarks/README.md). A harvest costs two per model parameter and token. Hours are operations over one rate, measured or given.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count
from everyscope.cost.storage import Rate, SiteDemand, StoragePlan, storage_plan
from everyscope.run.stages import Stages
from everyscope.sites.names import Site
from everyscope.suite.layout import width_label

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
FLOP_BY_PAIRS, FLOP_DENSE = 2, 10
"""Of a training step, per latent, input and row [operations]."""
FLOP_PER_MODEL_PARAMETER = 2


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


def plan(
    stages: Stages,
    teraflops: float | None = None,
    *,
    disk_gbps: float | None = None,
    model_tokens_per_second: float | None = None,
) -> Plan:
    """Price a run.

    Rates to reckon with: `teraflops` [10^12 operations/s], None measures this machine's product; `disk_gbps` [10^9 bytes/s],
    None measures the disk of the run's folder; `model_tokens_per_second` [tokens/s], None divides operations by teraflops.
    """
    config, size = stages.config, NUMBER_BYTES[stages.config.harvest.dtype]
    is_by_pairs = config.train.device == "cpu" and config.train.engine != "dense"
    flop_per_row = FLOP_BY_PAIRS if is_by_pairs else FLOP_DENSE
    most = max(config.tokens_of(site) for site in config.all_sites)  # one pass of the model writes every site
    tokens = dict.fromkeys(config.all_sites, most)
    saes = []
    for group in config.groups:
        for site in config.sites(group):
            for sae in config.saes_of(group):
                d_in = config.shape.d_in(site)
                saes.append(
                    PlannedSae(
                        site=site,
                        width=sae.width,
                        sparsity_coefficient=sae.sparsity_coefficient,
                        target_l0=sae.target_l0,
                        seed=sae.seed,
                        num_tokens=group.num_tokens,
                        parameter_bytes=4 * (2 * d_in * sae.width + 2 * sae.width + d_in),
                        flop=float(flop_per_row) * d_in * sae.width * group.num_tokens,
                    )
                )
    rate, origin = (
        (measure_product(), "a matrix product on this machine, just now") if teraflops is None else (teraflops * 1e12, "given")
    )
    flop_per_token = float(FLOP_PER_MODEL_PARAMETER) * config.shape.num_parameters
    model = Rate(rate / flop_per_token, origin) if model_tokens_per_second is None else Rate(model_tokens_per_second, "given")
    banks = {(sae.site, sae.num_tokens) for sae in saes}
    demands = [
        SiteDemand(
            config.shape.d_in(site) * size, rows, tuple(trained for other, trained in sorted(banks, key=str) if other == site)
        )
        for site, rows in tokens.items()
    ]
    return Plan(
        name=config.name,
        saes=tuple(saes),
        tokens_of=tokens,
        bytes_of={site: rows * config.shape.d_in(site) * size for site, rows in tokens.items()},
        dtype=config.harvest.dtype,
        harvest_flop=flop_per_token * max(tokens.values()),
        flop_per_second=rate,
        rate_origin=origin,
        storage=storage_plan(demands, sum(sae.flop for sae in saes) / rate, model, stages.out, disk_gbps),
    )


def measure_product(size: int = 1024, seconds: float = 0.2) -> float:
    """Operations per second of a float32 product [size, size] x [size, size] on this machine's CPU."""
    random = np.random.default_rng(0)
    left, right = (random.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    np.matmul(left, right)
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        np.matmul(left, right)
        products += 1
    return products * 2 * size**3 / (time.perf_counter() - start)


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
        "harvest_hours": price.hours(price.harvest_flop),
        "train_hours": price.hours(price.train_flop),
        "storage": price.storage.as_json(),
    }


def plan_tables(price: Plan) -> list[Table]:
    """The plan for people: a table of SAEs by site and width, one of totals, and one of disk or live."""
    saes = Table(title=f"{price.name}: {len(price.saes)} SAEs", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("site", "layers", "width", "SAEs", "tokens", "weights", "FLOP", "hours"):
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
            f"{price.hours(flop):,.{0 if price.hours(flop) >= 100 else 2}f}",
        )
        saes.add_row(kind, layers, *cells)
    totals = Table(title="Totals", title_justify="left", show_header=False, box=box.SIMPLE)
    totals.add_row("latents", human_count(price.num_latents))
    totals.add_row("SAE weights, float32", human_bytes(sum(sae.parameter_bytes for sae in price.saes)))
    totals.add_row("harvest", f"{price.harvest_flop:.2e} FLOP, {price.hours(price.harvest_flop):,.3g} h")
    totals.add_row("training", f"{price.train_flop:.2e} FLOP, {price.hours(price.train_flop):,.2f} h")
    totals.add_row("rate", f"{price.flop_per_second / 1e12:,.2f} TFLOP/s ({price.rate_origin})")
    for what, size in storage_options(price):
        totals.add_row(f"shards, {what}", human_bytes(size) if size else "none")
    return [saes, totals, price.storage.table()]


def _span(layers: list[int]) -> str:
    """Ascending layers as text: 0-25, or 5, 12, 19 where some are left out."""
    is_whole = len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if is_whole else ", ".join(str(layer) for layer in layers)
