"""Evaluate many SAEs of a model on the held-out documents of a text.

Two sweeps over the same blocks. The first makes one clean forward pass per batch, which feeds every SAE's sums, and one pass per
SAE from its layer on. The second measures baselines at the L0s that were found, as far as they are not known yet. SAEs whose
scores are there are skipped, without loading the model; a killed evaluation resumes where it was last saved.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from everyscope.base.errors import ConfigError, ShapeMismatch
from everyscope.base.files import PARTIAL
from everyscope.base.ids import content_id
from everyscope.base.progress import say
from everyscope.evaluate import baseline_sweep
from everyscope.evaluate.baseline_sweep import MeasuredBaselines, measure_baselines
from everyscope.evaluate.baselines import Baseline, baselines_of
from everyscope.evaluate.bootstrap import Resampler
from everyscope.evaluate.calibration import Calibration, calibrate
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import Cost, keep_cost
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.held_out import HeldOut, ranges_of, read_held_out
from everyscope.evaluate.intervals import resample_ablations, resample_site
from everyscope.evaluate.layouts import embedding_scale, of_embeddings, of_mlp_inputs
from everyscope.evaluate.linear import linear_maps
from everyscope.evaluate.passes import Evaluated, measure_batch
from everyscope.evaluate.rounding import rounded
from everyscope.evaluate.scores import Findings, metrics_of, write_scores
from everyscope.evaluate.sums import SaeState, SaeSums, State
from everyscope.evaluate.targets import EvaluateTarget, load_targets
from everyscope.evaluate.uniformity import UniformitySums
from everyscope.evaluate.work import Counter, Work, counted, planned_blocks
from everyscope.sae.folded import Sae
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site, places_of, site_of_convention
from everyscope.sites.registry import ModelAdapter

PROGRESS_FILE = "progress.safetensors"
"""The saved sums of an unfinished evaluation, in the scores folder."""


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation left on disk."""

    scores: Path
    """The scores folder: <site>/layer_<L>/<SAE>/metrics.json and latents.parquet, and cost.json."""
    num_evaluated: int
    """SAEs evaluated in this run."""
    num_skipped: int
    """SAEs whose scores were there already."""


def run(config: EvaluateConfig, progress: Counter | None = None) -> EvaluateResult:
    """Score every SAE that the config asks for and that has no scores under this config yet.

    It has one bar, or counts on `progress`, which expects as many blocks as `planned_blocks` says.
    Raises DataError (no SAE, no token to measure), ShapeMismatch and NonFinite (SAE, shards and model do not fit, or break
    down), ModelError and TextError (model or text cannot be read), ConfigError, StorageError.
    """
    targets = load_targets(config)
    groups = _pending(config, targets)
    num_pending = sum(len(group.pending) for group in groups)
    if num_pending:
        held_out = read_held_out(config)
        if held_out.num_sequences < config.num_sequences:
            say(
                f"The held-out text ends after {held_out.num_sequences} of {config.num_sequences} sequences; "
                "the scores are of those"
            )
        pending = [group for group in groups if group.pending]
        with counted("evaluate", config, [len(group.pending) for group in pending], progress) as work:
            _evaluate(config, held_out, pending, work)
    for name in (PROGRESS_FILE, baseline_sweep.PROGRESS_FILE):
        for leftover in (config.out / name, config.out / (name + PARTIAL)):
            leftover.unlink(missing_ok=True)
    return EvaluateResult(config.out, num_pending, len(targets) - num_pending)


@dataclass(frozen=True)
class _Group:
    """SAEs that are measured in one sweep."""

    pending: tuple[EvaluateTarget, ...]
    """Those without scores."""
    identity: str
    """Of all of them, scored or not."""


def blocks_left(config: EvaluateConfig) -> int:
    """Blocks that `run` would count on a `progress`."""
    pending = [len(group.pending) for group in _pending(config, load_targets(config)) if group.pending]
    return planned_blocks(config, pending)


def _pending(config: EvaluateConfig, targets: list[EvaluateTarget]) -> list[_Group]:
    """Every group, with its SAEs that have no scores yet."""
    return [
        _Group(tuple(target for target in group if not target.is_scored), content_id([target.identity for target in group]))
        for group in _groups(targets, config.saes_at_once)
    ]


def _groups(targets: list[EvaluateTarget], size: int | None) -> Iterator[list[EvaluateTarget]]:
    """`targets`, which come by site, in groups of a fixed size; the same groups whether or not some are scored already."""
    size = size or len(targets)
    return (targets[start : start + size] for start in range(0, len(targets), size))


def _evaluate(config: EvaluateConfig, held_out: HeldOut, groups: list[_Group], work: Work) -> None:
    """Both sweeps and the scores of each group in turn."""
    language, device = load_language_model(config.model), torch.device(config.model.device)
    pending = [target for group in groups for target in group.pending]
    sites = sorted({target.site for target in pending})
    calibrations = calibrate(config, sorted(places_of(sites)), language, work.advance)
    linear = {site: its.to(device) for site, its in linear_maps(config, sites, calibrations, language, work.advance).items()}
    calibrations = {site: calibration.to(device) for site, calibration in calibrations.items()}
    has_unscaled = any(target.is_of_unscaled_embeddings for target in pending)
    scale = embedding_scale(language.model) if has_unscaled else 1.0
    for group in groups:
        saes = {target.identity: _load(target, calibrations, config, language.adapter, device, scale) for target in group.pending}
        evaluated = Evaluated(language.model, group.pending, saes, calibrations, config.baseline_blocks)
        state, cost = _measure(config, held_out, evaluated, work)
        keep_cost(config.out, f"saes {group.identity}", cost)
        wanted = _wanted(group.pending, state)
        baselines = measure_baselines(config, language.model, held_out, calibrations, wanted, linear, work)
        _write(config, held_out, evaluated, state, baselines)
        (config.out / PROGRESS_FILE).unlink(missing_ok=True)


def _load(
    target: EvaluateTarget,
    calibrations: dict[Site, Calibration],
    config: EvaluateConfig,
    adapter: ModelAdapter,
    device: torch.device,
    scale: float,
) -> Sae:
    """The SAE, rounded; `scale` is what the model multiplies rows of its embedding matrix by."""
    sae = target.sae()
    if target.is_of_unscaled_embeddings:
        sae = of_embeddings(sae, scale)
    if (other := site_of_convention(target.site, sae.metadata.convention)) is not None:
        raise ConfigError(
            f"{target.folder}: reads {other.inputs[0]}, and would be scored at {target.site}, which reads "
            f"{target.site.inputs[0]}; move it below {other.kind}/"
        )
    sizes = {"d_in": (sae.d_in, target.site.inputs[0]), "d_out": (sae.d_out, target.site.outputs[0])}
    for name, (got, place) in sizes.items():
        if got != (want := len(calibrations[place].mean)):
            raise ShapeMismatch(
                f"{target.folder}: the SAE has {name}={got}, {place} of {config.model.name} gives {want}; "
                "is it an SAE of another model or site?"
            )
    return rounded(of_mlp_inputs(sae, adapter, target.site.layer).to(device), config.sae_dtype)


def _start(held_out: HeldOut, evaluated: Evaluated) -> SaeState:
    """Empty sums for every site and SAE."""
    sizes, documents = held_out.sizes, {"document": held_out.sizes["document"]}
    calibrations = evaluated.calibrations
    device = next(iter(calibrations.values())).mean.device

    def moments_of(sizes: Mapping[str, int]) -> dict[Site, Tables]:
        return {site: Tables.start(sizes, 2 + len(evaluated.calibration(site).mean), device) for site in evaluated.sites}

    def sums_of(target: EvaluateTarget) -> SaeSums:
        mean, d_sae = evaluated.calibration(target.site).mean, evaluated.saes[target.identity].d_sae
        return SaeSums(
            ReconstructionSums.start(mean, d_sae),
            ReconstructionSums.start(mean, d_sae),
            Tables.start(sizes, 3, device),
            Tables.start(documents, 3, device),
            Tables.start(sizes, 2, device),
            Tables.start(documents, 1, device),
            UniformitySums.start(),
        )

    saes = {target.identity: sums_of(target) for target in evaluated.targets}
    clean, head = Tables.start(sizes, 2, device), Tables.start(documents, 2, device)
    return SaeState(clean, head, moments_of(sizes), moments_of(documents), saes)


def _measure(config: EvaluateConfig, held_out: HeldOut, evaluated: Evaluated, work: Work) -> tuple[SaeState, Cost]:
    """Sweep over all batches that are still to do, saving now and then and at the end."""
    state, progress = _start(held_out, evaluated), config.out / PROGRESS_FILE
    sweep = State(state.parts, held_out.identity)
    sweep.restore(progress)
    heads = (config.uniformity_sequences, min(config.gradient_blocks, config.batch_blocks))
    ranges = ranges_of(held_out.num_sequences, heads, (held_out.num_sequences, config.batch_blocks))
    per_batch = 1 + len(evaluated.targets)
    work.advance(per_batch * sum(map(len, ranges[: sweep.batches])), is_resumed=True)
    if sweep.batches < len(ranges):
        work.advance(sweep.steps * len(ranges[sweep.batches]), is_resumed=True)
    for batch in held_out.batches(ranges[sweep.batches :], torch.device(config.model.device)):
        began, with_gradients = time.monotonic(), batch.start < config.uniformity_sequences
        for number, _ in enumerate(measure_batch(evaluated, state, batch, with_gradients, sweep.steps)):
            work.advance(len(batch.input_ids))
            if number:
                sweep.step(progress)
        cost = Cost(
            clean=1,
            spliced=len(evaluated.targets),
            backwards=int(with_gradients),
            seconds=time.monotonic() - began,
            tokens=batch.input_ids.numel(),
        )
        done = sweep.batches + 1
        sweep.batch(progress, cost, is_needed=done % config.checkpoint_batches == 0 or done == len(ranges))
    return state, sweep.cost


def _wanted(group: tuple[EvaluateTarget, ...], state: SaeState) -> dict[Site, set[Baseline]]:
    """The baselines at the L0s that the SAEs turned out to have."""
    wanted: dict[Site, set[Baseline]] = {}
    for target in group:
        sums = state.saes[target.identity].reconstruction
        wanted.setdefault(target.site, set()).update(
            baselines_of(sums.l0, len(sums.firings), is_transcoder=target.site.is_transcoder)
        )
    return wanted


def _write(
    config: EvaluateConfig, held_out: HeldOut, evaluated: Evaluated, state: SaeState, baselines: MeasuredBaselines
) -> None:
    """The scores of every SAE of a group."""
    resampler = Resampler(held_out.sizes["document"], config.resamples, config.interval_level, config.seed)
    for site in evaluated.sites:
        ablations = resample_ablations(config, state.head, baselines.sites[site].ablated)
        resamples = resample_site(resampler, state, site, ablations)
        input_limit = float(evaluated.calibrations[site.inputs[0]].norm_limit) if site.inputs != site.outputs else None
        found = Findings(config, held_out, state, evaluated.calibration(site), baselines, resamples, input_limit)
        for target in (target for target in evaluated.targets if target.site == site):
            write_scores(target.scores, metrics_of(target, found), state.saes[target.identity].reconstruction)
