"""The sweep that measures baselines: it comes after the SAEs', for baselines have the L0s that the SAEs turned out to have.

What it finds is kept, in a file for each site and one for each size, so that another SAE of a known size costs no pass. The
errors of any number of components or coordinates follow from one vector per site: only losses need passes of their own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.base.ids import content_id
from everyscope.base.progress import meter
from everyscope.evaluate.baselines import Baseline, Edit, edit_of
from everyscope.evaluate.calibration import Calibration, source_of
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import keep_cost
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.held_out import Batch, HeldOut, ranges_of
from everyscope.evaluate.losses import next_token_losses
from everyscope.evaluate.passes import captured, clean_pass, spliced_logits
from everyscope.evaluate.sums import State, restore_part, save_part
from everyscope.sites.capture import Activations, capture
from everyscope.sites.names import Site

BASELINE_FOLDER = "baselines"
"""Below each site of the scores."""
PROGRESS_FILE = "progress_baselines.safetensors"
"""The saved sums of an unfinished sweep, in the scores folder."""
BASELINE_VERSION = 1
"""Part of what a kept file says that it was made from."""


@dataclass
class SiteBaselines:
    """What is summed once per site, whatever SAEs it has."""

    ablated: Tables
    """Loss with the site's activations replaced by zeros, and by the training mean, by document."""
    pca: Float[Tensor, " d_in"]
    """Squares of held-out rows, about the training mean, along each principal component."""
    neurons: Float[Tensor, " d_in"]
    """The same of coordinates, the largest of each row first."""

    @classmethod
    def start(cls, d_in: int, num_units: int, device: torch.device) -> Self:
        """Empty sums."""
        zeros = torch.zeros(d_in, dtype=torch.float64, device=device)
        return cls(Tables.start({"document": num_units}, 2, device), zeros, zeros.clone())

    def error(self, baseline: Baseline) -> float:
        """Sum of squared errors of so many components or coordinates: the squares along those left out, where nothing cancels."""
        return float((self.pca if baseline.kind == "pca" else self.neurons)[baseline.size :].sum())


@dataclass
class BaselineSums:
    """What is summed for one baseline of one size."""

    errors: Float[Tensor, ""]
    """sum ||x - x_hat||^2 over all rows, of a random dictionary."""
    firings: Float[Tensor, ""]
    """Its directions that fire, over all rows [latents]."""
    rows: Float[Tensor, ""]
    """Rows [tokens]."""
    spliced: Float[Tensor, ""]
    """Loss with the reconstruction in the activations' place, over the first `baseline_sequences` blocks [nats]."""
    clean: Float[Tensor, ""]
    """Loss of the untouched model over the same [nats]."""
    positions: Float[Tensor, ""]
    """Positions that counted for these two [tokens]."""

    @classmethod
    def start(cls) -> Self:
        """Empty sums, on the CPU."""
        return cls(*(torch.zeros((), dtype=torch.float64) for _ in fields(cls)))

    @property
    def delta_loss(self) -> float | None:
        """Rise of the loss [nats/token]; None where no position counted."""
        return float((self.spliced - self.clean) / self.positions) if float(self.positions) else None


@dataclass(frozen=True)
class Measured:
    """All baselines that an evaluation asked for."""

    sites: dict[Site, SiteBaselines]
    sizes: dict[tuple[Site, Baseline], BaselineSums]


@dataclass(frozen=True)
class _Sweep:
    """What is still to be measured."""

    model: Any
    calibrations: dict[Site, Calibration]
    sites: dict[Site, SiteBaselines]
    sizes: dict[tuple[Site, Baseline], BaselineSums]
    edits: dict[tuple[Site, Baseline], Edit]
    head: int
    """Blocks with which sized baselines are spliced in [blocks]."""

    def sized(self, start: int) -> list[tuple[Site, Baseline]]:
        """The sized baselines that need the rows of a batch that starts at block `start`: dictionaries need all."""
        return [key for key in self.sizes if start < self.head or key[1].kind == "random_dictionary"]

    def passes(self, start: int) -> int:
        """Forward passes that the batch which starts there takes."""
        sized = self.sized(start)
        return bool(self.sites or sized) + 2 * len(self.sites) + (len(sized) if start < self.head else 0)


def measure_baselines(
    config: EvaluateConfig,
    model: Any,
    held_out: HeldOut,
    calibrations: dict[Site, Calibration],
    wanted: dict[Site, set[Baseline]],
) -> Measured:
    """All baselines of `wanted`, and the ablations of its sites: from their files, else measured now. Resumable as SAEs are."""
    device = torch.device(config.model.device)
    sites = {site: SiteBaselines.start(len(calibrations[site].mean), held_out.sizes["document"], device) for site in wanted}
    sizes = {(site, baseline): BaselineSums.start() for site, found in sorted(wanted.items()) for baseline in sorted(found)}
    parts: dict[str, Any] = {_name(site): part for site, part in sites.items()}
    parts |= {_name(*key): part for key, part in sizes.items()}
    sources = _sources(config, held_out, [*wanted], [*parts])
    missing = [name for name, part in parts.items() if not restore_part(_file(config, name), part, sources[name])]
    if not missing:
        return Measured(sites, sizes)
    pending = {key: part for key, part in sizes.items() if _name(*key) in missing}
    sweep = _Sweep(
        model,
        calibrations,
        {site: part for site, part in sites.items() if _name(site) in missing},
        pending,
        {(site, baseline): edit_of(baseline, calibrations[site], config.seed) for site, baseline in pending},
        config.baseline_sequences,
    )
    state = State({name: parts[name] for name in missing}, held_out.identity)
    _run(config, held_out, sweep, state)
    keep_cost(config.out, f"baselines {content_id(sources)}", state.cost)
    for name in missing:
        save_part(_file(config, name), parts[name], sources[name])
    (config.out / PROGRESS_FILE).unlink(missing_ok=True)
    return Measured(sites, sizes)


def _name(site: Site, baseline: Baseline | None = None) -> str:
    """Where a site's part, or that of one of its baselines, is kept below the scores."""
    return f"{site.folder}/{BASELINE_FOLDER}/{baseline.name if baseline else 'ablations'}"


def _file(config: EvaluateConfig, name: str) -> Path:
    return config.out / f"{name}.safetensors"


def _sources(config: EvaluateConfig, held_out: HeldOut, sites: list[Site], names: list[str]) -> dict[str, str]:
    """What each part is made from, by name: a part on disk that was made from something else is made anew."""
    decides = config.model_dump(mode="json", include={"model", "batch_blocks", "baseline_sequences", "seed"})
    decides |= {"text": held_out.identity, "version": BASELINE_VERSION}
    calibrations = {site.folder: source_of(config, site) for site in sites}
    folder = {name: name.partition(f"/{BASELINE_FOLDER}/")[0] for name in names}
    return {name: content_id(decides | {"name": name, "calibration": calibrations[folder[name]]}) for name in names}


def _run(config: EvaluateConfig, held_out: HeldOut, sweep: _Sweep, state: State) -> None:
    """Sweep over the batches that are still to do, saving now and then."""
    progress = config.out / PROGRESS_FILE
    state.restore(progress)
    size = config.batch_blocks
    ranges = ranges_of(held_out.num_sequences, (config.baseline_sequences, size), (held_out.num_sequences, size))
    passes = [sweep.passes(blocks.start) for blocks in ranges]
    with meter("baselines", sum(passes), "passes") as progress_meter:
        if state.batches:
            progress_meter.advance(sum(passes[: state.batches]), is_resumed=True)
        for batch in held_out.batches(ranges[state.batches :], torch.device(config.model.device)):
            began = time.monotonic()
            if sweep.passes(batch.start):
                _measure(sweep, batch, progress_meter.advance)
            state.cost.baselines += passes[state.batches]
            state.cost.seconds += time.monotonic() - began
            state.batches += 1
            if state.batches % config.checkpoint_batches == 0 or state.is_due:
                state.save(progress)


@torch.no_grad()
def _measure(sweep: _Sweep, batch: Batch, passed: Callable[[], None]) -> None:
    """Add one batch to all that is still to be measured."""
    is_head, sized = batch.start < sweep.head, sweep.sized(batch.start)
    sites = sorted({*sweep.sites, *(site for site, _ in sized)})
    losses = torch.zeros(0)
    if is_head and sized:
        clean = clean_pass(sweep.model, sites, batch)
        activations, losses = clean.activations, next_token_losses(clean.logits, batch.input_ids, batch.mask)
        del clean
    else:
        activations = capture(sweep.model, captured(sites), batch.input_ids)
    passed()
    for site in sites:
        rows = activations[site][batch.mask]
        if site in sweep.sites:
            _ablate(sweep, batch, site, rows, activations)
            passed()
            passed()
        for key in (key for key in sized if key[0] == site):
            sums, (x_hat, firings) = sweep.sizes[key], sweep.edits[key](rows)
            if key[1].kind == "random_dictionary":
                sums.errors += (rows.double() - x_hat.double()).square().sum().cpu()
                sums.firings += firings.sum(dtype=torch.float64).cpu()
                sums.rows += len(rows)
            if is_head:
                sums.spliced += _spliced(sweep, batch, site, x_hat, activations).sum(dtype=torch.float64).cpu()
                sums.clean += losses.sum(dtype=torch.float64).cpu()
                sums.positions += len(losses)
                passed()


def _ablate(sweep: _Sweep, batch: Batch, site: Site, rows: Float[Tensor, "n d_in"], activations: Activations) -> None:
    """Add what a site needs once: two ablations and the squares along components and coordinates."""
    sums, calibration = sweep.sites[site], sweep.calibrations[site]
    zero = _spliced(sweep, batch, site, torch.zeros_like(rows), activations)
    mean = _spliced(sweep, batch, site, calibration.mean.to(rows.dtype).expand_as(rows), activations)
    sums.ablated.add(batch.loss_groups, torch.stack([zero, mean], dim=1))
    centred = rows.double() - calibration.mean
    sums.pca += (centred @ calibration.components).square().sum(0)
    sums.neurons += centred.square().sort(dim=1, descending=True).values.sum(0)


def _spliced(
    sweep: _Sweep, batch: Batch, site: Site, rows: Float[Tensor, "n d_in"], activations: Activations
) -> Float[Tensor, " m"]:
    logits = spliced_logits(sweep.model, batch.input_ids, site, rows, batch.mask, activations)
    return next_token_losses(logits, batch.input_ids, batch.mask, f"a baseline spliced in at {site}")
