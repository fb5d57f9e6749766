"""The scores of SAEs that were trained on the same architecture with random weights: what a score is worth on structure alone.

Reconstruction and automatic interpretation look much alike on trained and on random transformers (arXiv 2501.17727), so a
suite without this row says little. Loss is left out: a model with random weights has none worth keeping.
"""

from pathlib import Path

from everyscope.base.bundled import public_name
from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.evaluate.comparisons.config import RandomModelConfig
from everyscope.evaluate.comparisons.scored import read_scored
from everyscope.evaluate.comparisons.slices import is_current, write_slice

SLICE = "random_model.json"
VERSION = 2


def run(config: RandomModelConfig) -> Path:
    """Write slices/random_model.json and return its path; DataError where the evaluation is of a trained model.

    Each row names the suite's own SAE of the same site, width and nearest L0, if there is one, to be set beside.
    """
    model = config.random_evaluation.model
    if model.weights != "random":
        raise DataError(
            f'{config.random_evaluation.out}: its model has weights={model.weights!r}, expected "random"; train on those'
        )
    scored, own = read_scored(config.random_evaluation), read_scored(config.evaluate)
    path = config.slices / SLICE
    inputs = content_id([VERSION, [one.evidence for one in (*scored, *own)]])
    if not is_current(path, inputs):
        rows = []
        for one in scored:
            beside = [its for its in own if (its.site, its.width) == (one.site, one.width)]
            nearest = min(beside, key=lambda its: (abs(its.l0 - one.l0), its.name), default=None)
            rows.append(
                {
                    "site": one.site.folder,
                    "width": one.width,
                    "sae": None if nearest is None else nearest.name,
                    "l0": one.l0,
                    "fvu": one.fvu,
                    "fvu_usual": one.fvu_usual,
                    "fvu_pca_usual": one.metrics["fvu_pca_usual"],
                }
            )
        note = (
            f"SAEs trained and evaluated in the same way on {public_name(model.name)!r} with transformers' initial weights, seed "
            f"{model.weights_seed}; fvu_pca_usual is of that model's activations too"
        )
        write_slice(path, inputs, {"rows": rows, "note": note})
    return path
