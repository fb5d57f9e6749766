"""Our results have the form that SAEBench 0.6.0 publishes as a JSON Schema for its core evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch

from everyscope.publish.config import PublishConfig
from everyscope.publish.saebench import mean_nearest_cosine, result_file
from everyscope.suite.reader import load_suite

METRICS = {
    "model_behavior_preservation": ("kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"),
    "model_performance_preservation": ("ce_loss_score", "ce_loss_with_ablation", "ce_loss_with_sae", "ce_loss_without_sae"),
    "reconstruction_quality": ("explained_variance", "explained_variance_legacy", "mse", "cossim"),
    "shrinkage": ("l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias"),
    "sparsity": ("l0", "l1"),
    "token_stats": ("total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"),
    "misc_metrics": (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "average_max_encoder_cosine_sim",
        "average_max_decoder_cosine_sim",
        "frac_alive",
    ),
}
"""Categories and the numbers that each must have; token_stats has whole ones."""
ENVELOPE: dict[str, tuple[type, ...]] = {
    "eval_config": (dict,),
    "eval_id": (str,),
    "datetime_epoch_millis": (int,),
    "eval_result_metrics": (dict,),
    "sae_bench_commit_hash": (str,),
    "sae_lens_id": (str, type(None)),
    "sae_lens_release_id": (str, type(None)),
    "sae_lens_version": (str, type(None)),
    "sae_cfg_dict": (dict, type(None)),
}
"""Required keys of the envelope and their types."""
OPTIONAL: dict[str, tuple[type, ...]] = {
    "eval_type_id": (str,),
    "eval_result_details": (list,),
    "eval_result_unstructured": (object,),
}
CONFIG: dict[str, type] = {
    "model_name": str,
    "llm_dtype": str,
    "batch_size_prompts": int,
    "n_eval_reconstruction_batches": int,
    "n_eval_sparsity_variance_batches": int,
    "dataset": str,
    "context_size": int,
    "compute_kl": bool,
    "compute_ce_loss": bool,
    "compute_l2_norms": bool,
    "compute_sparsity_metrics": bool,
    "compute_variance_metrics": bool,
    "compute_featurewise_density_statistics": bool,
    "compute_featurewise_weight_based_metrics": bool,
    "exclude_special_tokens_from_reconstruction": bool,
    "verbose": bool,
}
"""Fields of the evaluation's config, none of them required."""


def check(result: dict[str, Any]) -> None:
    """Fail where `result` is not of the schema."""
    assert set(ENVELOPE) <= set(result)
    for key, value in result.items():
        assert isinstance(value, (ENVELOPE | OPTIONAL)[key]), key
    for key, value in result["eval_config"].items():
        assert type(value) is CONFIG[key], key
    assert set(result["eval_result_metrics"]) == set(METRICS)
    for category, names in METRICS.items():
        numbers = result["eval_result_metrics"][category]
        assert set(numbers) == set(names)
        for name, value in numbers.items():
            assert type(value) in ((int,) if category == "token_stats" else (int, float)), name


@pytest.fixture
def results(published: PublishConfig) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Of each SAE: its folder, its metrics, its results in SAEBench's form."""
    found = []
    for entry in load_suite(published.out):
        metrics = json.loads((entry.folder / "metrics.json").read_text())
        path = published.out / result_file("Test scope", entry.record.folder)
        found.append((entry.folder, metrics, json.loads(path.read_text())))
    return found


def test_results_are_of_saebenchs_form_and_name(results, published: PublishConfig):
    assert len(results) == len(list((published.out / "saebench/core").iterdir())) == 36
    assert result_file("Tiny scope", "a/layer_0/b") == "saebench/core/Tiny_scope_a_layer_0_b_eval_results.json"
    for _, _, result in results:
        check(result)
        assert result["eval_type_id"] == "core"
        assert result["sae_cfg_dict"]["hook_name"].startswith("blocks.")
    assert len({result["eval_id"] for _, _, result in results}) == 36


def test_a_missing_or_wrong_field_is_noticed(results):
    result = results[0][2]
    for broken in (
        {key: value for key, value in result.items() if key != "sae_cfg_dict"},
        result | {"eval_id": None},
        result | {"eval_result_metrics": result["eval_result_metrics"] | {"sparsity": {"l0": 1.0}}},
        result | {"eval_result_metrics": result["eval_result_metrics"] | {"sparsity": {"l0": 1.0, "l1": None}}},
    ):
        with pytest.raises(AssertionError):
            check(broken)


def test_numbers_are_those_of_the_metrics_and_what_is_not_measured_is_named(results):
    for folder, metrics, result in results:
        found = result["eval_result_metrics"]
        assert found["reconstruction_quality"]["explained_variance"] == 1 - metrics["fvu"]
        assert found["sparsity"]["l0"] == pytest.approx(metrics["l0"], rel=1e-12)
        table = pyarrow.parquet.read_table(folder / "latents.parquet").to_pylist()
        firings = np.array([row["firings"] for row in table])
        total = sum(row["firings"] * (row["mean_activation"] or 0.0) for row in table)
        assert found["sparsity"]["l1"] == pytest.approx(total / metrics["num_tokens"], rel=1e-6)
        assert found["misc_metrics"]["frac_alive"] == pytest.approx(1 - metrics["dead_fraction"])
        assert found["misc_metrics"]["freq_over_10_percent"] == pytest.approx(metrics["dense_fraction"])
        dense = firings[firings > 0.1 * metrics["num_tokens"]].sum() / max(1, firings.sum())
        assert found["misc_metrics"]["normalized_freq_over_10_percent"] == pytest.approx(dense)
        absent = [f"{name}.{key}" for name, its in found.items() for key, value in its.items() if value == -1]
        assert absent == result["eval_result_unstructured"]["not_measured"]
        assert "reconstruction_quality.explained_variance_legacy" in absent


def test_nearest_cosines_are_those_of_the_whole_matrix_and_leave_the_latent_itself_out():
    rows = torch.randn(2500, 5, generator=torch.Generator().manual_seed(0))
    unit = rows / rows.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    assert mean_nearest_cosine(rows) == pytest.approx(float(cosines.amax(1).mean()), abs=2e-6)
    assert mean_nearest_cosine(torch.eye(4)) == 0
    assert mean_nearest_cosine(rows[:1]) is None
