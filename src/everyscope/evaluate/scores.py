"""From sums to the two files of one SAE's scores: metrics.json and latents.parquet. No dates: equal sums give equal bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from everyscope.base.bundled import public_name
from everyscope.base.errors import DataError
from everyscope.base.files import write_sealed
from everyscope.base.tables import write_table
from everyscope.evaluate.baseline_sweep import Measured, SiteBaselines
from everyscope.evaluate.baselines import baselines_of
from everyscope.evaluate.breakdowns import by_position, by_segment, firing, high_norm, ratio
from everyscope.evaluate.calibration import Calibration
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.groups import Tables
from everyscope.evaluate.held_out import HeldOut
from everyscope.evaluate.intervals import SiteResamples, intervals_of, segment_intervals
from everyscope.evaluate.segments import SEGMENTS
from everyscope.evaluate.sums import SaeState, SaeSums
from everyscope.evaluate.targets import Target
from everyscope.sae.files import WEIGHTS
from everyscope.sae.metrics import ReconstructionSums
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.text.config import TextConfig


@dataclass(frozen=True)
class Findings:
    """All that one SAE's scores are made of."""

    config: EvaluateConfig
    held_out: HeldOut
    state: SaeState
    calibration: Calibration
    """Of the SAE's site."""
    baselines: Measured
    resamples: SiteResamples
    """Of the SAE's site."""


def metrics_of(target: Target, found: Findings) -> dict[str, Any]:
    """Everything metrics.json says about one SAE. Losses in nats/token; fractions in [1]; null where a ratio is undefined."""
    config, held_out = found.config, found.held_out
    sae, moments = found.state.saes[target.identity], found.state.sites[target.site]
    return {
        "site": target.site.kind,
        "layer": target.site.layer,
        "d_in": len(sae.reconstruction.reference),
        "width": len(sae.reconstruction.firings),
        **_reconstruction(sae.reconstruction),
        **_losses(sae, found.state, found.baselines.sites[target.site]),
        "intervals": intervals_of(sae, found.resamples),
        "interval_level": config.interval_level,
        **_baselines(target, found),
        "by_position": by_position(sae, moments, found.state.clean),
        "by_segment": _turns(sae, moments, found),
        "firing": firing(sae.reconstruction),
        "uniformity": sae.uniformity.as_json(),
        "high_norm": high_norm(sae, moments, float(found.calibration.norm_threshold)),
        "num_tokens": sae.reconstruction.num_tokens,
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


def _turns(sae: SaeSums, moments: Tables, found: Findings) -> dict[str, Any] | None:
    """The numbers of user and model with their intervals; None where the text has no turns."""
    if found.held_out.segments is None:
        return None
    intervals = segment_intervals(sae, moments, found.state.clean, found.resamples.resampler)
    numbers = by_segment(sae, moments, found.state.clean)
    return {name: {**numbers[name], "intervals": intervals[name]} for name in SEGMENTS}


def _reconstruction(sums: ReconstructionSums) -> dict[str, Any]:
    names = ("l0", "fvu", "fvu_uncentred", "mse", "cosine", "l2_ratio", "reconstruction_bias", "dead_fraction", "dense_fraction")
    return {name: getattr(sums, name) for name in names}


def _losses(sae: SaeSums, state: SaeState, baselines: SiteBaselines) -> dict[str, Any]:
    """Losses with the SAE and with ablations, over the same positions."""
    count, clean_sum = state.clean.total.tolist()
    if not count:
        raise DataError("no position of the held-out text counts for the loss; give more text")
    spliced, kl = (sae.losses.total / count).tolist()
    zero, mean = (baselines.ablated.total / count).tolist()
    clean = clean_sum / count
    return {
        "delta_loss": spliced - clean,
        "kl": kl,
        "loss_recovered": loss_recovered(clean, spliced, mean),
        "loss_recovered_zero": loss_recovered(clean, spliced, zero),
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_zero_ablated": zero,
        "loss_mean_ablated": mean,
        "delta_loss_zero": zero - clean,
        "delta_loss_mean": mean - clean,
    }


def _baselines(target: Target, found: Findings) -> dict[str, Any]:
    """FVU, L0 and delta loss of everything that an SAE must beat; of the ablations, over all blocks."""
    sae, site = found.state.saes[target.identity], found.baselines.sites[target.site]
    sums, losses = sae.reconstruction, _losses(sae, found.state, site)
    spread = sums.centred_squares
    rows: dict[str, dict[str, Any]] = {
        "zero": {"fvu": float(sums.squares) / spread, "l0": None, "delta_loss": losses["delta_loss_zero"]},
        "mean": {"fvu": float(sums.shifted_squares) / spread, "l0": None, "delta_loss": losses["delta_loss_mean"]},
    }
    for baseline in baselines_of(sums.l0, len(sums.firings)):
        measured = found.baselines.sizes[target.site, baseline]
        is_random = baseline.kind == "random_dictionary"
        rows[baseline.kind] = {
            "fvu": (float(measured.errors) if is_random else site.error(baseline)) / spread,
            "l0": ratio(float(measured.firings), float(measured.rows)) if is_random else min(baseline.size, len(site.pca)),
            "delta_loss": measured.delta_loss,
        }
    return {
        "fvu_pca": rows["pca"]["fvu"],
        "baselines": rows,
        "baseline_sequences": min(found.config.baseline_sequences, found.held_out.num_sequences),
    }


def loss_recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """(ablated - spliced) / (ablated - clean) [1]: 1 where splicing costs nothing, 0 where it costs as much as ablation."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None


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
