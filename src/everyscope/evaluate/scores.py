"""From sums to the two files of one SAE's scores: metrics.json and latents.parquet. No dates: equal sums give equal bytes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from everyscope.base.bundled import public_name
from everyscope.base.errors import DataError
from everyscope.base.files import write_sealed
from everyscope.base.tables import write_table
from everyscope.evaluate.baseline_sweep import MeasuredBaselines, SiteBaselines
from everyscope.evaluate.baselines import baselines_of
from everyscope.evaluate.breakdowns import by_position, by_segment, firing, massive, ratio
from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.held_out import HeldOut
from everyscope.evaluate.intervals import SiteResamples, intervals_of, segment_intervals
from everyscope.evaluate.segments import SEGMENTS
from everyscope.evaluate.sums import SaeState, SaeSums
from everyscope.evaluate.targets import EvaluateTarget
from everyscope.sae.files import WEIGHTS
from everyscope.sae.metrics import ReconstructionSums
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.text.config import TextConfig


@dataclass(frozen=True)
class Findings:
    """The measurements behind one SAE's scores."""

    config: EvaluateConfig
    held_out: HeldOut
    state: SaeState
    calibration: Calibration
    """Of the SAE's site."""
    baselines: MeasuredBaselines
    resamples: SiteResamples
    """Of the SAE's site."""
    input_limit: float | None = None
    """Of transcoders, the norm above which what they read is massive."""


def metrics_of(target: EvaluateTarget, found: Findings) -> dict[str, Any]:
    """Everything metrics.json says about one SAE. Losses in nats/token; fractions in [1]; null where a ratio is undefined."""
    config, held_out = found.config, found.held_out
    sae, moments = found.state.saes[target.identity], found.state.sites[target.site]
    intervals, losses = intervals_of(sae, found.resamples), _losses(sae, found.state)
    ablations = _ablations(sae, found.state, found.baselines.sites[target.site], intervals)
    return {
        "site": target.site.kind,
        "layer": target.site.layer,
        "d_in": len(sae.reconstruction.reference),
        "width": len(sae.reconstruction.firings),
        **_reconstruction(sae),
        **losses,
        **ablations,
        "loss_zero_ablated": _raised(losses["loss_clean"], ablations["delta_loss_zero"]),
        "loss_mean_ablated": _raised(losses["loss_clean"], ablations["delta_loss_mean"]),
        "intervals": intervals | ({"loss_recovered": None} if ablations["loss_recovered"] is None else {}),
        "interval_level": config.interval_level,
        **_baselines(target, found, ablations),
        "by_position": by_position(sae, moments, found.state.clean),
        "by_segment": _turns(sae, moments, found),
        "firing": firing(sae.reconstruction),
        "uniformity": sae.uniformity.as_json(),
        "massive": massive(sae, config.max_norm, float(found.calibration.norm_limit)) | _input_limit(found),
        "num_tokens": sae.reconstruction.num_tokens + int(sae.massive.count),
        "num_usual_tokens": sae.reconstruction.num_tokens,
        "num_loss_tokens": int(found.state.clean.total[0]),
        "num_documents": held_out.num_documents,
        "num_sequences": held_out.num_sequences,
        "context": config.text.context,
        "model": public_name(config.model.name),
        "precision": {"sae": config.sae_dtype, "model": config.model.dtype},
        "data": describe_text(config.text),
        "mask": "BOS, EOS, padding and prefix excluded",
        "evaluation": target.identity,
        WEIGHTS: target.digest,
    }


def _input_limit(found: Findings) -> dict[str, float | None]:
    """What is massive of a transcoder's input; nothing for SAEs."""
    if found.input_limit is None:
        return {}
    return {"input_norm_limit": found.input_limit if math.isfinite(found.input_limit) else None}


def _turns(sae: SaeSums, moments: Tables, found: Findings) -> dict[str, Any] | None:
    """The numbers of user and model with their intervals; None where the text has no turns."""
    if found.held_out.segments is None:
        return None
    intervals = segment_intervals(sae, moments, found.state.clean, found.resamples.resampler)
    numbers = by_segment(sae, moments, found.state.clean)
    return {name: {**numbers[name], "intervals": intervals[name]} for name in SEGMENTS}


def _reconstruction(sae: SaeSums) -> dict[str, Any]:
    """Plain FVU is of all rows, everything else of the usual ones."""
    whole, usual = sae.reconstruction.merged(sae.massive), sae.reconstruction
    names = ("mse", "cosine", "l2_ratio", "reconstruction_bias", "dead_fraction", "dense_fraction")
    return {
        "l0": usual.l0,
        "fvu": whole.fvu,
        "fvu_usual": usual.fvu,
        "fvu_uncentred": whole.fvu_uncentred,
        **{name: getattr(usual, name) for name in names},
    }


def _losses(sae: SaeSums, state: SaeState) -> dict[str, Any]:
    """Losses with the SAE and without, over all blocks."""
    count, clean_sum = state.clean.total.tolist()
    if not count:
        raise DataError("no position of the held-out text counts for the loss; give more text")
    spliced, kl = (sae.losses.total / count).tolist()
    clean = clean_sum / count
    return {"delta_loss": spliced - clean, "kl": kl, "loss_clean": clean, "loss_spliced": spliced}


def _ablations(sae: SaeSums, state: SaeState, site: SiteBaselines, intervals: dict[str, list[float] | None]) -> dict[str, Any]:
    """What zeros and the training mean cost over the blocks in which they were spliced, and what of that the SAE recovers there.

    A share is null, with the reason, where the cost is within its own noise; all is null where nothing was spliced.
    """
    names, shares = ("zero", "mean"), ("loss_recovered_zero", "loss_recovered")
    count, clean_sum = state.head.total.tolist()
    if not count:
        nothing: dict[str, Any] = {f"delta_loss_{name}": None for name in names} | dict.fromkeys(shares)
        return nothing | {f"{share}_reason": "no block was spliced with ablations" for share in shares}
    clean, spliced = clean_sum / count, float(sae.head.total[0]) / count
    found: dict[str, Any] = {}
    for name, share, ablated in zip(names, shares, (site.ablated.total / count).tolist(), strict=True):
        cost = ablated - clean
        reason = too_cheap(cost, intervals[f"delta_loss_{name}"])
        found[f"delta_loss_{name}"] = cost
        found[share] = None if reason else (ablated - spliced) / cost
        found[f"{share}_reason"] = reason and f"{name} ablation {reason}"
    return found


def _baselines(target: EvaluateTarget, found: Findings, ablations: dict[str, Any]) -> dict[str, Any]:
    """FVU, L0 and delta loss of everything that an SAE must beat."""
    sae, site = found.state.saes[target.identity], found.baselines.sites[target.site]
    usual, whole = sae.reconstruction, sae.reconstruction.merged(sae.massive)

    def fvus(errors: float, usual_errors: float) -> dict[str, float]:
        return {"fvu": errors / whole.centred_squares, "fvu_usual": usual_errors / usual.centred_squares}

    rows: dict[str, dict[str, Any]] = {
        "zero": {**fvus(float(whole.squares), float(usual.squares)), "l0": None, "delta_loss": ablations["delta_loss_zero"]},
        "mean": {
            **fvus(float(whole.shifted_squares), float(usual.shifted_squares)),
            "l0": None,
            "delta_loss": ablations["delta_loss_mean"],
        },
    }
    for baseline in baselines_of(usual.l0, len(usual.firings), is_transcoder=target.site.is_transcoder):
        measured = found.baselines.sizes[target.site, baseline]
        is_summed = baseline.needs_rows
        of_usual, of_massive = (float(measured.errors), float(measured.massive_errors)) if is_summed else site.errors(baseline)
        l0 = ratio(float(measured.firings), float(measured.rows)) if is_summed else min(baseline.size, site.pca.shape[1])
        rows[baseline.kind] = {
            **fvus(of_usual + of_massive, of_usual),
            "l0": None if baseline.kind == "linear" else l0,
            "delta_loss": measured.delta_loss,
        }
    return {
        "fvu_pca": rows["pca"]["fvu"],
        "fvu_pca_usual": rows["pca"]["fvu_usual"],
        "baselines": rows,
        "baseline_sequences": min(found.config.baseline_blocks, found.held_out.num_sequences),
    }


def too_cheap(cost: float, interval: Sequence[float] | None) -> str | None:
    """Why no share of an ablation's cost can be given; None where it can.

    A share of a cost that is within its own noise is noise: a cost [nats/token] must be known to better than half of itself.
    """
    if interval is None:
        return f"costs {cost:.3g} nats/token, with unknown noise: its interval needs two documents"
    if min(interval) <= cost / 2:
        return f"costs {cost:.3g} nats/token, within its noise: [{interval[0]:.3g}, {interval[1]:.3g}]"
    return None


def _raised(clean: float, cost: float | None) -> float | None:
    return None if cost is None else clean + cost


def describe_text(text: TextConfig) -> str:
    """The corpus in words, for tables and captions."""
    names = {
        "standard_library": "Python standard library",
        "standard_library_docstrings": "Python standard library docstrings",
        "standard_library_instructions": "Requests about Python standard library functions, answered",
        "arithmetic": "Generated arithmetic",
        "files": ", ".join(path.name for path in text.paths),
        "dataset": f"{text.dataset} {text.dataset_config or ''}".strip(),
    }
    return f"{names[text.source]}, held-out documents"


def write_scores(folder: Path, metrics: dict[str, Any], sums: ReconstructionSums) -> None:
    """Write latents.parquet, then metrics.json: a folder with metrics is whole."""
    write_table(folder / LATENTS_FILE, latent_table(sums), compression="zstd")
    write_sealed(folder / METRICS_FILE, metrics)


def latent_table(sums: ReconstructionSums) -> pyarrow.Table:
    """Per latent: firings [tokens], frequency [1], mean while firing and maximum [raw units], null where it never fires."""
    firings = sums.firings.cpu().numpy()
    is_dead = firings == 0

    def alive(values: np.ndarray) -> pyarrow.Array:
        return pyarrow.array(values.astype(np.float32), mask=is_dead)

    return pyarrow.table(
        {
            "latent": pyarrow.array(np.arange(len(firings), dtype=np.int32)),
            "firings": pyarrow.array(firings),
            "frequency": pyarrow.array(sums.frequencies.cpu().numpy()),
            "mean_activation": alive(sums.mean_activations.cpu().numpy()),
            "max_activation": alive(sums.activation_maxima.cpu().numpy()),
        }
    )
