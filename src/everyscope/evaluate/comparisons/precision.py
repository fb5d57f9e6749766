"""One canonical SAE per site in shorter number formats, its weights and the language model's."""

from pathlib import Path

from everyscope.base.ids import content_id
from everyscope.evaluate.comparisons.canonical import canonical_of_sites
from everyscope.evaluate.comparisons.config import PrecisionConfig
from everyscope.evaluate.comparisons.scored import read_scored
from everyscope.evaluate.comparisons.slices import is_current, write_slice
from everyscope.evaluate.comparisons.variants import Variant, evaluate_variants, identities, row_of

SLICE, FOLDER = "precision.json", "precision"
VERSION = 2


def run(config: PrecisionConfig) -> Path:
    """Write slices/precision.json and return its path: every pair of formats, all on the same text."""
    base = config.base
    chosen = canonical_of_sites(read_scored(config.evaluate), config.canonical_l0)
    variants = {}
    for sae_dtype, model_dtype in config.pairs:
        changes = {"sae_dtype": sae_dtype, "model": base.model.model_copy(update={"dtype": model_dtype})}
        changes["shards"] = base.shards  # another rounding of the same model: its training rows are the same ones
        out = config.work / FOLDER / f"sae_{sae_dtype}_model_{model_dtype}"
        variants[sae_dtype, model_dtype] = Variant(chosen, out, changes)
    found = evaluate_variants(base, variants, "precision")
    path = config.slices / SLICE
    inputs = content_id([VERSION, list(found), identities(found.values())])
    if not is_current(path, inputs):
        rows = [
            row_of(name, metrics) | {"sae_dtype": sae_dtype, "model_dtype": model_dtype, "loss_clean": metrics["loss_clean"]}
            for (sae_dtype, model_dtype), variant in found.items()
            for name, metrics in variant.items()
        ]
        write_slice(path, inputs, {"rows": rows})
    return path
