"""The rows that stand before a source's batches: release, model, source set and source.

The importer hands these to its database as they are, which refuses fields that it does not know: only fields that Neuronpedia's
schema has had throughout stand here, and none that is null.
"""

from typing import Any

from everyscope.base.errors import DataError
from everyscope.publish.described import SuiteText
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.names import NeuronpediaSource, set_prefix
from everyscope.suite.records import SuiteIndex

SET_DESCRIPTION_CHARACTERS = 128
"""Length of a source set's description that the API takes [characters]."""


def metadata_rows(
    config: NeuronpediaConfig,
    index: SuiteIndex,
    source: NeuronpediaSource,
    text: SuiteText,
    saelens: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The one row of each file. `saelens` is the SAE's cfg.json, `facts` is what its latents.parquet says of itself."""
    ours = {"creatorId": config.creator_id, "visibility": config.visibility}
    release = set_prefix(config, index)
    return {
        "release.jsonl": ours
        | {
            "name": release,
            "description": index.title,
            "descriptionShort": index.title,
            "creatorName": config.creator_name,
            "creatorNameShort": config.creator_name,
            "urls": list(config.urls),
            "isNewUi": False,
            "featured": False,
        },
        "model.jsonl": ours
        | {
            "id": source.model_id,
            "displayName": index.model,
            "displayNameShort": source.model_id,
            "layers": text.num_layers,
            "neuronsPerLayer": 0,
            "dimension": text.d_model,
            "owner": index.model.partition("/")[0] if "/" in index.model else "custom",
            "instruct": source.model_id.endswith("-it"),
            "inferenceEnabled": False,
        },
        "sourceset.jsonl": ours
        | {
            "modelId": source.model_id,
            "name": source.set_name,
            "description": source.description,
            "creatorName": config.creator_name,
            "urls": list(config.urls),
            "releaseName": release,
            "hasDashboards": True,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
        },
        "source.jsonl": ours | _source_row(config, index, source, saelens, facts),
    }


def _source_row(
    config: NeuronpediaConfig, index: SuiteIndex, source: NeuronpediaSource, saelens: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    hub = {} if config.hf_repo is None else {"hfRepoId": config.hf_repo, "hfFolderId": source.record.folder}
    counts = {"num_prompts": facts.get("num_sequences"), "num_tokens_in_prompt": facts.get("context")}
    metrics = source.record.metrics
    plain = f" (with massive tokens {metrics.fvu:.3f})" if metrics.num_massive_tokens else ""
    notes = (
        f"L0 {metrics.l0:.1f}, FVU {metrics.fvu_usual:.3f}{plain}, delta loss {metrics.delta_loss:.3f} nats/token on "
        f"{index.measured.data}; examples are from training and held-out documents, bins are fifths of the firings"
    )
    if facts.get("logit_path"):
        notes += f"; logits along {facts['logit_path']}"
    return hub | {
        "id": source.id,
        "modelId": source.model_id,
        "setName": source.set_name,
        "hasDashboards": True,
        "inferenceEnabled": False,
        "saelensConfig": saelens
        | {"metadata": {**saelens.get("metadata", {}), "neuronpedia_id": f"{source.model_id}/{source.id}"}},
        "dataset": index.measured.data,
        "notes": notes,
        **{name: value for name, value in counts.items() if value is not None},
    }


def set_body(config: NeuronpediaConfig, source: NeuronpediaSource) -> dict[str, Any]:
    """What the API wants to know of a new source set."""
    body: dict[str, Any] = {"name": source.set_name, "modelId": source.model_id, "description": source.description}
    assert len(source.description) <= SET_DESCRIPTION_CHARACTERS, source.description
    return body | ({"url": config.urls[0]} if config.urls else {})


def model_body(source: NeuronpediaSource, index: SuiteIndex, text: SuiteText) -> dict[str, Any]:
    """What it wants to know of a new model."""
    return {"id": source.model_id, "layers": text.num_layers, "displayName": index.model[:64]}


def hook_name(source: NeuronpediaSource, saelens: dict[str, Any]) -> str:
    """TransformerLens's name of the SAE's site; DataError where cfg.json does not tell it."""
    metadata = saelens.get("metadata")
    name = metadata.get("hook_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str):
        raise DataError(f"{source.record.folder}/cfg.json: has no metadata.hook_name; publish the suite again")
    return name
