"""The canonical SAEs on several named corpora: what they reconstruct well, and what not."""

from pathlib import Path

from everyscope.base.ids import content_id
from everyscope.evaluate.comparisons.canonical import canonical_saes
from everyscope.evaluate.comparisons.config import SubsetsConfig
from everyscope.evaluate.comparisons.scored import read_scored
from everyscope.evaluate.comparisons.slices import is_current, write_slice
from everyscope.evaluate.comparisons.variants import Variant, evaluate_variants, identities, row_of

SLICE, FOLDER = "subsets.json", "subsets"
VERSION = 2


def run(config: SubsetsConfig) -> Path:
    """Write slices/subsets.json and return its path. Corpora are evaluated one after another, each as any evaluation is."""
    chosen = list(canonical_saes(read_scored(config.evaluate), config.canonical_l0).values())
    variants = {
        subset.name: Variant(chosen, config.work / FOLDER / subset.name, {"text": subset.text}) for subset in config.subsets
    }
    found = evaluate_variants(config.base, variants, "subsets")
    path = config.slices / SLICE
    words = [(subset.name, subset.description) for subset in config.subsets]
    inputs = content_id([VERSION, words, identities(found.values())])
    if not is_current(path, inputs):
        subsets = []
        for subset in config.subsets:
            metrics = found[subset.name]
            first = next(iter(metrics.values()))
            subsets.append(
                {
                    "name": subset.name,
                    "description": subset.description or first["data"],
                    "num_tokens": first["num_tokens"],
                    "num_documents": first["num_documents"],
                    "loss_clean": first["loss_clean"],
                    "rows": [row_of(name, its) for name, its in metrics.items()],
                }
            )
        write_slice(path, inputs, {"subsets": subsets})
    return path
