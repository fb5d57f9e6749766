"""Core metrics in SAEBench's envelope (0.6.0), one file per SAE, so that viewers of its results read ours.

Its schema demands a number everywhere. Where SAEBench itself has none it writes -1, and so do we for what we do not measure;
`eval_result_unstructured.not_measured` names those fields. Where its formula is known to be wrong ours stands under its name:
explained_variance is 1 - plain FVU over the whole set. Everything else leaves massive tokens out, which
`eval_result_unstructured.massive` counts. Details per latent are left out, which the schema allows: they would need firings per
prompt. There is no date: equal scores give equal bytes.
"""

from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.base.files import write_json
from everyscope.base.tables import read_table
from everyscope.publish.formats import published_saelens_config
from everyscope.publish.targets import PublishTarget
from everyscope.sae.folded import Sae
from everyscope.suite.layout import LATENTS_FILE, SAEBENCH_FOLDER

NOT_MEASURED = -1
"""What SAEBench writes for a number that it does not have."""
COSINE_WIDTH = 2**14
"""Latents up to which nearest cosines within an SAE are computed: their cost grows with the square [latents]."""
COSINE_ROWS = 1024
"""Latents compared with all others at once [latents]."""


def result_file(release: str, folder: str) -> str:
    """The path below the suite of the results of the SAE in `folder`, named as SAEBench names them."""
    return f"{SAEBENCH_FOLDER}/{f'{release}_{folder}_eval_results.json'.replace('/', '_').replace(' ', '_')}"


def write_saebench(suite: Path, release: str, version: str, source: PublishTarget, sae: Sae, record: dict[str, Any]) -> str:
    """Write the results of one SAE and return their path below the suite."""
    metrics = source.metrics
    categories = {**_of_metrics(metrics), **_of_latents(source.scores / LATENTS_FILE, sae, metrics["num_usual_tokens"])}
    absent = [f"{name}.{key}" for name, its in categories.items() for key, value in its.items() if value is None]
    config = published_saelens_config(sae, source.site, metrics["model"], record, metrics)
    name = result_file(release, source.folder)
    result = {
        "eval_type_id": "core",
        "eval_config": _config(metrics),
        "eval_id": str(uuid5(NAMESPACE_URL, f"{metrics['evaluation']}/{source.folder}")),
        "datetime_epoch_millis": 0,
        "eval_result_metrics": {
            category: {key: NOT_MEASURED if value is None else value for key, value in its.items()}
            for category, its in categories.items()
        },
        "eval_result_details": [],
        "sae_bench_commit_hash": f"not run by SAEBench but by everyscope {version}",
        "sae_lens_id": source.folder,
        "sae_lens_release_id": release,
        "sae_lens_version": None,
        "sae_cfg_dict": {**config, **config["metadata"], "hook_layer": source.site.layer},
        "eval_result_unstructured": {
            "not_measured": absent,
            "massive": {**metrics["massive"], "explained_variance_without": 1 - metrics["fvu_usual"]},
        },
    }
    write_json(suite / name, result)
    return name


def _config(metrics: dict[str, Any]) -> dict[str, Any]:
    """The fields of SAEBench's config that we have."""
    return {
        "model_name": metrics["model"],
        "llm_dtype": metrics["precision"]["model"],
        "dataset": metrics["data"],
        "context_size": metrics["context"],
        "compute_kl": True,
        "compute_ce_loss": True,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "exclude_special_tokens_from_reconstruction": True,
    }


def _of_metrics(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Categories that metrics.json fills; None for what it does not tell."""
    return {
        "model_behavior_preservation": {
            "kl_div_score": None,
            "kl_div_with_ablation": None,
            "kl_div_with_sae": metrics["kl"],
        },
        "model_performance_preservation": {
            "ce_loss_score": metrics["loss_recovered_zero"],
            "ce_loss_with_ablation": metrics["loss_zero_ablated"],
            "ce_loss_with_sae": metrics["loss_spliced"],
            "ce_loss_without_sae": metrics["loss_clean"],
        },
        "reconstruction_quality": {
            "explained_variance": 1 - metrics["fvu"],
            "explained_variance_legacy": None,
            "mse": metrics["mse"],
            "cossim": metrics["cosine"],
        },
        "shrinkage": {
            "l2_norm_in": None,
            "l2_norm_out": None,
            "l2_ratio": metrics["l2_ratio"],
            "relative_reconstruction_bias": metrics["reconstruction_bias"],
        },
        "token_stats": {
            "total_tokens_eval_reconstruction": metrics["num_loss_tokens"],
            "total_tokens_eval_sparsity_variance": metrics["num_tokens"],
        },
    }


def _of_latents(path: Path, sae: Sae, num_tokens: int) -> dict[str, dict[str, Any]]:
    """Categories that the latents' table and the weights fill."""
    table = read_table(path, ("firings", "mean_activation"), "run `everyscope evaluate` again")
    firings = table["firings"].to_numpy().astype(np.float64)
    activations = np.nan_to_num(table["mean_activation"].to_numpy().astype(np.float64))
    frequencies = firings / num_tokens
    total = firings.sum()
    is_small = sae.d_sae <= COSINE_WIDTH
    return {
        "sparsity": {"l0": float(total / num_tokens), "l1": float((activations * firings).sum() / num_tokens)},
        "misc_metrics": {
            "freq_over_1_percent": float((frequencies > 0.01).mean()),
            "freq_over_10_percent": float((frequencies > 0.1).mean()),
            "normalized_freq_over_1_percent": float(firings[frequencies > 0.01].sum() / total) if total else 0.0,
            "normalized_freq_over_10_percent": float(firings[frequencies > 0.1].sum() / total) if total else 0.0,
            "average_max_encoder_cosine_sim": mean_nearest_cosine(sae.W_enc.T) if is_small else None,
            "average_max_decoder_cosine_sim": mean_nearest_cosine(sae.W_dec) if is_small else None,
            "frac_alive": float((firings > 0).mean()),
        },
    }


def mean_nearest_cosine(rows: Float[Tensor, "d_sae d_in"]) -> float | None:
    """Mean over rows of the largest cosine with another row [1], to six digits: sums differ beyond them from machine to machine.

    None for a single row.
    """
    if len(rows) < 2:
        return None
    unit = torch.nn.functional.normalize(rows.float(), dim=1)
    total = 0.0
    for start in range(0, len(unit), COSINE_ROWS):
        cosines = unit[start : start + COSINE_ROWS] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, start + own] = -torch.inf
        total += float(cosines.amax(1).double().sum())
    return round(total / len(unit), 6)
