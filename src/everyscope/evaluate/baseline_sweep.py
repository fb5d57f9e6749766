"""The sweep that measures baselines: it comes after the SAEs', for baselines have the L0s that the SAEs turned out to have.

What it finds is kept, in a file for each site and one for each size, so that another SAE of a known size costs no pass. The
errors of any number of components or coordinates follow from one vector per site: only losses need passes of their own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.base.ids import content_id
from everyscope.evaluate.baselines import Baseline, Edit, edits_of
from everyscope.evaluate.calibration import Calibration, calibration_identity
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import Cost, keep_cost
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.held_out import Batch, HeldOut, ranges_of
from everyscope.evaluate.linear import LinearMap
from everyscope.evaluate.losses import next_token_losses
from everyscope.evaluate.passes import SiteRows, captured, clean_pass, rows_at, spliced_logits
from everyscope.evaluate.sums import State, restore_part, save_part
from everyscope.evaluate.work import Counter
from everyscope.sites.capture import Activations, capture
from everyscope.sites.names import Site

BASELINE_FOLDER = "baselines"
"""Below each site of the scores."""
PROGRESS_FILE = "progress_baselines.safetensors"
"""The saved sums of an unfinished sweep, in the scores folder."""
BASELINE_VERSION = 2
"""Version in the inputs that a kept file records."""


@dataclass
class SiteBaselines:
    """What is summed once per site, whatever SAEs it has."""

    ablated: Tables
    """Loss with the site's activations replaced by zeros, and by the training mean, by document, over `baseline_blocks`."""
    pca: Float[Tensor, "2 d_in"]
    """Squares of held-out rows, about the training mean, along each principal component: of usual rows, then of massive ones."""
    neurons: Float[Tensor, "2 d_in"]
    """The same of coordinates, the largest of each row first."""

    @classmethod
    def start(cls, d_in: int, num_units: int, device: torch.device) -> Self:
        """Empty sums."""
        zeros = torch.zeros(2, d_in, dtype=torch.float64, device=device)
        return cls(Tables.start({"document": num_units}, 2, device), zeros, zeros.clone())

    def errors(self, baseline: Baseline) -> tuple[float, float]:
        """Sums of squared errors of so many components or coordinates, over usual and over massive rows: the squares along those
        left out, where nothing cancels.
        """
        squares = self.pca if baseline.kind == "pca" else self.neurons
        return float(squares[0, baseline.size :].sum()), float(squares[1, baseline.size :].sum())


@dataclass
class BaselineSums:
    """What is summed for one baseline of one size."""

    errors: Float[Tensor, ""]
    """sum ||x - x_hat||^2 over usual rows, of a random dictionary or linear map."""
    massive_errors: Float[Tensor, ""]
    """The same over massive rows."""
    firings: Float[Tensor, ""]
    """Its directions that fire, over usual rows; a linear map's inputs [latents]."""
    rows: Float[Tensor, ""]
    """Usual rows [tokens]."""
    spliced: Float[Tensor, ""]
    """Loss with the reconstruction in the activations' place, over the first `baseline_blocks` [nats]."""
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
class MeasuredBaselines:
    """All baselines that an evaluation asked for."""

    sites: dict[Site, SiteBaselines]
    sizes: dict[tuple[Site, Baseline], BaselineSums]


@dataclass(frozen=True)
class _Sweep:
    """What is still to be measured."""

    model: Any
    calibrations: dict[Site, Calibration]
    """Of every place that is read or written."""
    sites: dict[Site, SiteBaselines]
    sizes: dict[tuple[Site, Baseline], BaselineSums]
    edits: dict[tuple[Site, Baseline], Edit]
    head: int
    """Blocks in which ablations and sized baselines are spliced [blocks]."""

    def sized(self, start: int) -> list[tuple[Site, Baseline]]:
        """The sized baselines that need the rows of a batch that starts at block `start`: some need all."""
        return [key for key in self.sizes if start < self.head or key[1].needs_rows]

    def calibration(self, site: Site) -> Calibration:
        """Of what coders at `site` write."""
        return self.calibrations[site.outputs[0]]

    def passes(self, start: int) -> int:
        """Forward passes that the batch which starts there takes."""
        sized = self.sized(start)
        return bool(self.sites or sized) + (2 * len(self.sites) + len(sized) if start < self.head else 0)


def measure_baselines(
    config: EvaluateConfig,
    model: Any,
    held_out: HeldOut,
    calibrations: dict[Site, Calibration],
    wanted: dict[Site, set[Baseline]],
    linear: dict[Site, LinearMap],
    work: Counter,
) -> MeasuredBaselines:
    """All baselines of `wanted`, and the ablations of its sites: from their files, else measured now. Resumable as SAEs are.

    `calibrations` are of places, `linear` of the sites that read one place and write another.

    `work` counts the blocks of each pass. What the passes have cost is entered with the scores, before the sums they paid for.
    """
    device = torch.device(config.model.device)
    sites = {
        site: SiteBaselines.start(len(calibrations[site.outputs[0]].mean), held_out.sizes["document"], device) for site in wanted
    }
    sizes = {(site, baseline): BaselineSums.start() for site, found in sorted(wanted.items()) for baseline in sorted(found)}
    parts: dict[str, Any] = {_name(site): part for site, part in sites.items()}
    parts |= {_name(*key): part for key, part in sizes.items()}
    sources = _sources(config, held_out, [*wanted], [*parts])
    missing = [name for name, part in parts.items() if not restore_part(_file(config, name), part, sources[name])]
    if not missing:
        return MeasuredBaselines(sites, sizes)
    pending = {key: part for key, part in sizes.items() if _name(*key) in missing}
    sweep = _Sweep(
        model,
        calibrations,
        {site: part for site, part in sites.items() if _name(site) in missing},
        pending,
        {
            (site, baseline): edit
            for site in sites
            for baseline, edit in edits_of(
                [baseline for place, baseline in pending if place == site],
                calibrations[site.outputs[0]],
                config.seed,
                linear.get(site),
            ).items()
        },
        config.baseline_blocks,
    )
    state = State({name: parts[name] for name in missing}, held_out.identity)
    _run(config, held_out, sweep, state, work)
    keep_cost(config.out, f"baselines {content_id(sources)}", state.cost)
    for name in missing:
        save_part(_file(config, name), parts[name], sources[name])
    (config.out / PROGRESS_FILE).unlink(missing_ok=True)
    return MeasuredBaselines(sites, sizes)


def _name(site: Site, baseline: Baseline | None = None) -> str:
    """Where a site's part, or that of one of its baselines, is kept below the scores."""
    return f"{site.folder}/{BASELINE_FOLDER}/{baseline.name if baseline else 'ablations'}"


def _file(config: EvaluateConfig, name: str) -> Path:
    return config.out / f"{name}.safetensors"


def _sources(config: EvaluateConfig, held_out: HeldOut, sites: list[Site], names: list[str]) -> dict[str, str]:
    """What each part is made from, by name: a part on disk that was made from something else is made again."""
    decides = config.model_dump(mode="json", include={"model", "batch_blocks", "seed"})
    decides |= {"text": held_out.identity, "version": BASELINE_VERSION, "head": config.baseline_blocks}
    calibrations = {site.folder: calibration_identity(config, site) for site in sites}
    folder = {name: name.partition(f"/{BASELINE_FOLDER}/")[0] for name in names}
    return {name: content_id(decides | {"name": name, "calibration": calibrations[folder[name]]}) for name in names}


def _run(config: EvaluateConfig, held_out: HeldOut, sweep: _Sweep, state: State, work: Counter) -> None:
    """Sweep over the batches that are still to do, saving now and then and at the end."""
    progress = config.out / PROGRESS_FILE
    state.restore(progress)
    size = config.batch_blocks
    ranges = ranges_of(held_out.num_sequences, (config.baseline_blocks, size), (held_out.num_sequences, size))
    passes = [sweep.passes(blocks.start) for blocks in ranges]
    done = zip(ranges[: state.batches], passes, strict=False)
    work.advance(sum(len(blocks) * count for blocks, count in done), is_resumed=True)
    for batch in held_out.batches(ranges[state.batches :], torch.device(config.model.device)):
        began = time.monotonic()
        if sweep.passes(batch.start):
            for number, num_passes in enumerate(_measure(sweep, batch, state.steps)):
                work.advance(num_passes * len(batch.input_ids))
                if number:
                    state.step(progress)
        cost = Cost(baselines=passes[state.batches], seconds=time.monotonic() - began)
        done = state.batches + 1
        state.batch(progress, cost, is_needed=done % config.checkpoint_batches == 0 or done == len(ranges))


@torch.no_grad()
def _measure(sweep: _Sweep, batch: Batch, num_done: int) -> Iterator[int]:
    """Add one batch to all that is still to be measured, in steps that may be kept one by one: the clean pass, then each site's
    own figures and each baseline. Gives the passes that each has taken. The first `num_done` behind the clean pass are in it.
    """
    is_head, sized = batch.start < sweep.head, sweep.sized(batch.start)
    sites = sorted({*sweep.sites, *(site for site, _ in sized)})
    losses = torch.zeros(0)
    if is_head:
        clean = clean_pass(sweep.model, sites, batch)
        activations, losses = clean.activations, next_token_losses(clean.logits, batch.input_ids, batch.mask)
        del clean
    else:
        activations = capture(sweep.model, captured(sites), batch.input_ids)
    yield 1
    number = 0
    for site in sites:
        here = rows_at(site, activations, batch, sweep.calibrations)
        keys = [None] * (site in sweep.sites) + [key for key in sized if key[0] == site]
        for key in keys:
            number += 1
            if number <= num_done:
                continue
            if key is None:
                _square(sweep, site, here)
                if is_head:
                    _ablate(sweep, batch, site, here, activations)
                yield 2 * is_head
            else:
                _add_baseline(sweep, batch, key, here, activations, losses)
                yield int(is_head)


def _add_baseline(
    sweep: _Sweep,
    batch: Batch,
    key: tuple[Site, Baseline],
    here: SiteRows,
    activations: Activations,
    losses: Float[Tensor, " m"],
) -> None:
    """Add what a sized baseline makes of one batch; `losses` are the untouched model's, where it is spliced in."""
    sums, edit = sweep.sizes[key], sweep.edits[key]
    rows, massive = (here.read, here.read_massive) if key[1].kind == "linear" else (here.usual, here.massive)
    x_hat, firings = edit(rows)
    if key[1].needs_rows:
        sums.errors += _squared(here.usual, x_hat)
        sums.massive_errors += _squared(here.massive, edit(massive)[0]) if len(massive) else 0
        sums.firings += firings.sum(dtype=torch.float64).cpu()
        sums.rows += len(here.usual)
    if batch.start < sweep.head:
        sums.spliced += _spliced(sweep, batch, key[0], x_hat, here, activations).sum(dtype=torch.float64).cpu()
        sums.clean += losses.sum(dtype=torch.float64).cpu()
        sums.positions += len(losses)


def _squared(x: Float[Tensor, "n d_in"], x_hat: Float[Tensor, "n d_in"]) -> Float[Tensor, ""]:
    return (x.double() - x_hat.double()).square().sum().cpu()


def _square(sweep: _Sweep, site: Site, here: SiteRows) -> None:
    """Add the squares along components and coordinates, from which the errors of any number of them follow."""
    sums, calibration = sweep.sites[site], sweep.calibration(site)
    for place, rows in enumerate((here.usual, here.massive)):
        centred = rows.double() - calibration.mean
        sums.pca[place] += (centred @ calibration.components).square().sum(0)
        sums.neurons[place] += centred.square().sort(dim=1, descending=True).values.sum(0)


def _ablate(sweep: _Sweep, batch: Batch, site: Site, here: SiteRows, activations: Activations) -> None:
    """Add the losses with zeros and with the training mean in the activations' place."""
    rows, mean = here.usual, sweep.calibration(site).mean.to(here.usual.dtype)
    replacements = (torch.zeros_like(rows), mean.expand_as(rows))
    losses = [_spliced(sweep, batch, site, replaced, here, activations) for replaced in replacements]
    sweep.sites[site].ablated.add(batch.loss_groups, torch.stack(losses, dim=1))


def _spliced(
    sweep: _Sweep, batch: Batch, site: Site, rows: Float[Tensor, "n d_in"], here: SiteRows, activations: Activations
) -> Float[Tensor, " m"]:
    logits = spliced_logits(sweep.model, batch.input_ids, site, rows, here.mask, activations)
    return next_token_losses(logits, batch.input_ids, batch.mask, f"a baseline spliced in at {site}")
