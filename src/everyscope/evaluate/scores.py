"""From sums to the two files of one SAE's scores: metrics.json and latents.parquet. No dates: equal sums give equal bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from everyscope.base.files import whole_file, write_json
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.sums import EvaluationSums
from everyscope.evaluate.targets import Target
from everyscope.sae.metrics import ReconstructionSums
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.text.config import TextConfig


def metrics_of(target: Target, config: EvaluateConfig, sums: EvaluationSums) -> dict[str, Any]:
    """Everything metrics.json says about one SAE. Losses in nats/token; fractions in [1]; null where a ratio is undefined."""
    sae, site = sums.saes[target.identity], sums.sites[target.site]
    reconstruction = sae.reconstruction
    clean, spliced = sums.clean.mean, sae.spliced.mean
    zero, mean = site.zero_ablated.mean, site.mean_ablated.mean
    return {
        "site": target.site.kind,
        "layer": target.site.layer,
        "d_in": len(reconstruction.reference),
        "width": len(reconstruction.firings),
        "l0": reconstruction.l0,
        "fvu": reconstruction.fvu,
        "fvu_uncentred": reconstruction.fvu_uncentred,
        "fvu_pca": site.pca.fvu(round(reconstruction.l0)),
        "delta_loss": spliced - clean,
        "loss_recovered": loss_recovered(clean, spliced, mean),
        "loss_recovered_zero": loss_recovered(clean, spliced, zero),
        "loss_clean": clean,
        "loss_spliced": spliced,
        "loss_zero_ablated": zero,
        "loss_mean_ablated": mean,
        "cosine": reconstruction.cosine,
        "reconstruction_bias": reconstruction.reconstruction_bias,
        "dead_fraction": reconstruction.dead_fraction,
        "dense_fraction": reconstruction.dense_fraction,
        "num_tokens": reconstruction.num_tokens,
        "num_loss_tokens": int(sums.clean.count),
        "num_sequences": sums.sequences,
        "context": config.text.context,
        "model": config.model.name,
        "data": describe_text(config.text),
        "mask": "BOS, EOS, padding and prefix excluded",
        "evaluation": target.identity,
    }


def loss_recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """(ablated - spliced) / (ablated - clean) [1]: 1 where splicing costs nothing, 0 where it costs as much as ablation."""
    return (ablated - spliced) / (ablated - clean) if ablated != clean else None


def describe_text(text: TextConfig) -> str:
    """The corpus in words, for tables and captions."""
    names = {
        "standard_library": "Python standard library",
        "standard_library_docstrings": "Python standard library docstrings",
        "files": ", ".join(path.name for path in text.paths),
        "dataset": f"{text.dataset} {text.dataset_config or ''}".strip(),
    }
    return f"{names[text.source]}, held-out documents"


def write_scores(folder: Path, metrics: dict[str, Any], sums: ReconstructionSums) -> None:
    """Write latents.parquet, then metrics.json: a folder with metrics is whole."""
    with whole_file(folder / LATENTS_FILE) as partial:
        pyarrow.parquet.write_table(latent_table(sums), partial, compression="zstd")
    write_json(folder / METRICS_FILE, metrics)


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
