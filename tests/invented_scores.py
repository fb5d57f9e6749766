"""Invented trained SAEs, scores and slices, quick to make: publishing reads numbers and tensors, and runs no model."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from small_scope import random_sae

from everyscope.base.files import write_sealed
from everyscope.base.tables import write_table
from everyscope.evaluate.scores import write_scores
from everyscope.publish.config import PublishConfig
from everyscope.sae.files import weights_digest, write_sae
from everyscope.sae.metrics import ReconstructionSums
from everyscope.sites.names import Site

SITES = tuple(Site(kind, layer) for kind in ("attn_out", "mlp_out", "resid_post") for layer in range(2))
BASELINES = {"zero": 1.3, "mean": 1.0, "pca": 0.9, "random_dictionary": 0.95, "neuron_basis": 0.85}
"""Names and FVUs of the baselines."""
POSITIONS = 23


def add_sae(config: PublishConfig, site: Site, name: str, width: int, threshold: float) -> dict[str, Any]:
    """A random SAE with the scores of random rows; gives its metrics."""
    sae = random_sae(6, width, threshold, torch.zeros(6), seed=width)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(site.layer))
    sums = ReconstructionSums.start(torch.zeros(6), width)
    sums.update(x, sae(x), sae.encode(x))
    metrics = {
        "site": site.kind,
        "layer": site.layer,
        "d_in": 6,
        "width": width,
        "l0": sums.l0,
        "fvu": sums.fvu,
        "fvu_usual": sums.fvu,
        "fvu_uncentred": sums.fvu,
        "fvu_pca": BASELINES["pca"],
        "fvu_pca_usual": BASELINES["pca"],
        "mse": 6 * sums.fvu,
        "cosine": sums.cosine,
        "l2_ratio": 0.97,
        "reconstruction_bias": 0.98,
        "kl": 0.08 * sums.fvu,
        **_losses(sums.fvu),
        "intervals": _intervals(sums.l0, sums.fvu, sums.cosine),
        "interval_level": 0.95,
        "baselines": {
            kind: {"fvu": fvu, "fvu_usual": fvu, "l0": None if kind in ("zero", "mean") else sums.l0, "delta_loss": 0.2 * fvu}
            for kind, fvu in BASELINES.items()
        },
        "baseline_sequences": 8,
        "by_position": _by_position(sums.fvu),
        "by_segment": None,
        "firing": _firing(sums),
        "uniformity": {"r_l0": 0.6, "entropy": 1.1, "effective": 0.6 * sums.l0, "num_positions": 90},
        "massive": {
            "max_norm": 8.0,
            "norm_limit": 50.0,
            "num_tokens": 0,
            "share_of_tokens": 0.0,
            "share_of_squares": 0.0,
            "share_of_variance": 0.0,
            "l0": None,
        },
        "precision": {"sae": "float32", "model": "float32"},
        "dead_fraction": sums.dead_fraction,
        "dense_fraction": sums.dense_fraction,
        "num_tokens": 400,
        "num_usual_tokens": 400,
        "num_loss_tokens": 380,
        "num_documents": 12,
        "num_sequences": 20,
        "context": 24,
        "model": "some/model",
        "data": "invented rows <&>, held-out documents",
        "mask": "BOS, EOS, padding and prefix excluded",
        "evaluation": "0",
    }
    write_sae(config.trained / site.folder / name, sae, {"num_tokens": 1000, "config": {"sparsity_coefficient": 0.1}})
    metrics["weights_sha256"] = weights_digest(config.trained / site.folder / name)
    write_scores(config.scores / site.folder / name, metrics, sums)
    return metrics


def _losses(fvu: float) -> dict[str, float | None]:
    delta = 0.1 * fvu
    return {
        "delta_loss": delta,
        "delta_loss_mean": 1.0,
        "delta_loss_zero": 2.0,
        "loss_recovered": 1 - delta,
        "loss_recovered_reason": None,
        "loss_recovered_zero": 1 - delta / 2,
        "loss_recovered_zero_reason": None,
        "loss_clean": 2.5,
        "loss_spliced": 2.5 + delta,
        "loss_mean_ablated": 3.5,
        "loss_zero_ablated": 4.5,
    }


def _intervals(l0: float, fvu: float, cosine: float) -> dict[str, list[float] | None]:
    return {
        "l0": [0.97 * l0, 1.04 * l0],
        "fvu": [0.9 * fvu, 1.1 * fvu],
        "fvu_usual": [0.9 * fvu, 1.1 * fvu],
        "delta_loss": [0.08 * fvu, 0.12 * fvu],
        "kl": [0.07 * fvu, 0.09 * fvu],
        "loss_recovered": None,
        "delta_loss_zero": [1.9, 2.1],
        "delta_loss_mean": [0.9, 1.1],
        "cosine": [cosine - 0.01, cosine],
    }


def _by_position(fvu: float) -> dict[str, list]:
    rising = [6 * fvu * (0.4 + 0.6 * place / POSITIONS) for place in range(POSITIONS)]
    return {
        "position": list(range(1, POSITIONS + 1)),
        "count": [17] * POSITIONS,
        "error": rising,
        "fvu": [None, *(error / 6 for error in rising[1:])],
        "delta_loss": [*([0.1 * fvu] * (POSITIONS - 1)), None],
        "loss_count": [*([17] * (POSITIONS - 1)), 0],
    }


def _firing(sums: ReconstructionSums) -> dict[str, Any]:
    edges = [step / 4 for step in range(-32, 1)]
    frequencies = sums.frequencies.numpy()
    counts = np.histogram(np.log10(frequencies[frequencies > 0]), edges)[0].tolist()
    return {
        "log10_edges": edges,
        "counts": counts,
        "dead": sums.dead_fraction,
        "dense_1": float((frequencies > 0.01).mean()),
        "dense_10": float((frequencies > 0.1).mean()),
        "dense_10_share_of_l0": 0.3,
    }


def add_slices(config: PublishConfig, site: Site, narrow: str, wide: str) -> None:
    """Every slice, about two SAEs of one site, called by their names there; and what it has all cost."""
    names = [f"{site.folder}/{name}" for name in (narrow, wide)]
    numbers = {"l0": 9.0, "fvu": 0.2, "fvu_usual": 0.2, "delta_loss": 0.02}
    ends = {"intervals": {"fvu_usual": [0.1, 0.3], "delta_loss": [0.01, 0.03]}}
    rows = [{"site": site.folder, "sae": name, **numbers, **ends} for name in names]
    shares = {"matched": 0.3, "split": 0.5, "new": 0.2}
    table = f"splitting/{site.folder}/{narrow}__{wide}.parquet"
    slices = {
        "widths": {"groups": [{"site": site.folder, "l0": 9.0, "points": _points(names)}]},
        "splitting": {
            "pairs": [
                {
                    "site": site.folder,
                    "narrow": names[0],
                    "wide": names[1],
                    **shares,
                    "null": {"matched": 0.01, "split": 0.0, "new": 0.99},
                    "threshold": 0.6,
                    "table": table,
                }
            ]
        },
        "transfer": {"base": "some/model", "tuned": "some/model-it", "data": "chats", "rows": _transfer(names[0], site)},
        "subsets": {"subsets": [{"name": text, "description": text, "num_tokens": 99, "rows": rows} for text in ("a", "b")]},
        "precision": {
            "rows": [
                {**row, "sae_dtype": dtype, "model_dtype": "float32", "loss_clean": 2.5, "num_tokens": 99}
                for row in rows
                for dtype in ("float32", "int8")
            ]
        },
        "probing": {"tasks": ["comment"], "seeds": 3, "num_tokens": 99, "rows": _probes(rows)},
        "random_model": {"rows": [{**rows[0], "width": 512, "fvu_pca_usual": 0.5}], "note": "random"},
    }
    for name, content in slices.items():
        _write(config.scores / "slices" / f"{name}.json", content | {"inputs": "0"})
    path = config.scores / "slices" / table
    write_table(path, pyarrow.table({"narrow": pyarrow.array([0, 1], pyarrow.int32())}))
    forwards = {"clean": 5, "spliced": 180, "baselines": 40, "calibration": 0}
    _write(config.scores / "cost.json", {"forwards": forwards, "backwards": 2, "seconds": 1.5, "tokens": 480})


def _points(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"width": width, "sae": name, "l0": 9.0, "fvu": 0.2, "delta_loss": 0.02, "fvu_usual_at_l0": fvu, "delta_loss_at_l0": None}
        for width, name, fvu in zip((512, 1024), names, (0.2, 0.15), strict=True)
    ]


def _transfer(name: str, site: Site) -> list[dict[str, Any]]:
    told = {
        "site": site.folder,
        "name": name,
        "width": 512,
        "target": None,
        "l0": 9.0,
        "fvu_usual": 0.2,
        "num_tokens": 50,
        "intervals": {},
    }
    return [
        {**told, "sae": sae, "segment": segment, "delta_loss": delta}
        for segment, delta in (("all", 0.02), ("user", -0.01), ("model", 0.03))
        for sae in ("base", "tuned")
    ]


def _probes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    baseline = {"neurons": 0.6, "dense": 0.95, "majority": 0.5}
    return [
        {
            "task": "comment",
            "site": row["site"],
            "sae": row["sae"],
            "k": k,
            "accuracy": 0.8,
            "f1": 0.7,
            "interval": [0.7, 0.9],
            "baseline": baseline,
        }
        for row in rows
        for k in (1, 5)
    ]


def _write(path: Path, value: Any) -> None:
    write_sealed(path, value)
