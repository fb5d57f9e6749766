"""SAEs of a base model on its instruction-tuned sibling, beside SAEs that were trained on the sibling itself.

The user's prompt and the model's answer are measured apart: an instruction-tuned model is not trained to predict users, so on
prompts a reconstruction from the base model's dictionary can even lower the loss (Gemma Scope, figures 19 and 20).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everyscope.base.bundled import public_name
from everyscope.base.errors import DataError
from everyscope.base.ids import content_id
from everyscope.evaluate.comparisons.canonical import canonical_saes
from everyscope.evaluate.comparisons.config import TransferConfig
from everyscope.evaluate.comparisons.scored import Scored, read_scored
from everyscope.evaluate.comparisons.slices import is_current, write_slice
from everyscope.evaluate.comparisons.variants import Variant, evaluate_variants, identities
from everyscope.evaluate.config import EvaluateConfig

SLICE, FOLDER = "transfer.json", "transfer"
VERSION = 2


def run(config: TransferConfig) -> Path:
    """Write slices/transfer.json and return its path.

    SAEs trained on the tuned model are compared where the base model has SAEs too. DataError where the text has no turns, or
    where the two have no site in common.
    """
    evaluations = {"base": config.evaluate} | ({} if config.tuned_evaluation is None else {"tuned": config.tuned_evaluation})
    chosen = _at_common_sites({name: _chosen(config, evaluation) for name, evaluation in evaluations.items()})
    if not all(chosen.values()):
        raise DataError(
            f"no site has SAEs both of {config.evaluate.model.name!r} and of {config.tuned.name!r}; train both on the same sites"
        )
    variants = {}
    for name, evaluation in evaluations.items():  # the same settings for both, whatever the tuned SAEs were scored under before
        its = {"trained": evaluation.trained, "sites": evaluation.sites, "site_kind": evaluation.site_kind}
        its |= {"model": config.tuned, "text": config.text}
        variants[name] = Variant(chosen[name], config.work / FOLDER / name, its)
    found = evaluate_variants(config.base, variants, "transfer")
    path = config.slices / SLICE
    inputs = content_id([VERSION, identities(found.values())])
    if not is_current(path, inputs):
        rows = [row for name, saes in chosen.items() for one in saes for row in _rows(name, one, found[name][one.name], config)]
        data = next(iter(found["base"].values()))["data"]
        models = {"base": public_name(config.evaluate.model.name), "tuned": public_name(config.tuned.name)}
        content = {**models, "data": data, "rows": rows}
        write_slice(path, inputs, content)
    return path


def _chosen(config: TransferConfig, evaluation: EvaluateConfig) -> list[Scored]:
    scored = read_scored(evaluation)
    return list(canonical_saes(scored, config.canonical_l0).values()) if config.is_canonical_only else scored


def _at_common_sites(chosen: dict[str, list[Scored]]) -> dict[str, list[Scored]]:
    """Only the SAEs of sites that all of them have."""
    common = set.intersection(*({one.site for one in saes} for saes in chosen.values()))
    return {name: [one for one in saes if one.site in common] for name, saes in chosen.items()}


def _rows(source: str, one: Scored, metrics: dict[str, Any], config: TransferConfig) -> Iterator[dict[str, Any]]:
    """A row for the whole text, one for each segment."""
    segments = metrics["by_segment"]
    if segments is None:
        raise DataError(
            f"{config.text.origin}: opens no turn of the model, or the tokenizer of {config.tuned.name!r} has no chat template; "
            'give text with turns, as source="standard_library_instructions", or a prefix and a suffix'
        )
    common = {"site": one.site.folder, "name": one.name, "width": one.width, "target": one.target_l0, "sae": source}
    yield common | {"segment": "all"} | _numbers(metrics)
    for segment, its in segments.items():
        yield common | {"segment": segment} | _numbers(its)


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of all turns or of one side's."""
    numbers = {key: metrics[key] for key in ("l0", "fvu_usual", "delta_loss", "intervals")}
    return numbers | {"num_tokens": metrics.get("num_usual_tokens", metrics["num_tokens"])}
