"""The rows of the bulk layout, as columns of JSON: features, activations and explanations.

The fields are those of Neuronpedia's tables, which its importer takes from the first line of each file: so every row has them
all, and what a suite does not measure (alignment with neurons, histograms of logits) is empty. Rows carry no date, so that
equal suites give equal bytes; the importing database dates them.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Int

from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.examples import Examples
from everyscope.publish.neuronpedia.json_columns import (
    MEASURED_DIGITS,
    ROUNDED_DIGITS,
    arrays,
    constant,
    halves,
    integers,
    joined,
    literals,
    numbers,
    objects,
    quoted,
)
from everyscope.publish.neuronpedia.latents import Entries, LatentRange, entries, list_lengths
from everyscope.publish.neuronpedia.names import NeuronpediaSource
from everyscope.publish.neuronpedia.text import SuiteText

BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
ACTIVATION, EXPLANATION = "a", "e"
"""What an id is of: its character behind the source's."""
SOURCE_CHARACTERS, LATENT_CHARACTERS, NUMBER_CHARACTERS = 13, 6, 4
"""Of an id: how many tell the source, the latent (36^6 are two thousand million) and the row among the latent's. With the c in
front and the character of the kind they are 25."""
SAME_SAE = 0
"""The relation of neighbours in the same SAE, as docs/reference/latents.md numbers them."""
UNMEASURED = (
    "vector",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
)
"""Fields of features that stay empty."""


def feature_rows(
    latents: LatentRange,
    text: SuiteText,
    source: NeuronpediaSource,
    config: NeuronpediaConfig,
    hook_name: str,
    firings: Int[np.ndarray, " all_latents"],
) -> pyarrow.Array:
    """A row for each latent, dead ones too. `firings` are those of all latents of the SAE."""
    batch = latents.batch
    maximum = numbers(latents.values("max_activation"), MEASURED_DIGITS)
    near = entries(batch, "neighbours")
    near = near.where(near.numbers("relation") == SAME_SAE)
    fields: dict[str, pyarrow.Array | str] = dict.fromkeys(UNMEASURED, "[]")
    for name, column in (("pos", "top_logits"), ("neg", "bottom_logits")):
        logits = entries(batch, column)
        fields[f"{name}_str"] = arrays(token_texts(logits, text), logits.counts)
        fields[f"{name}_values"] = arrays(numbers(logits.numbers("value"), ROUNDED_DIGITS), logits.counts)
    return objects(
        fields
        | _histogram(latents)
        | _company(latents, firings)
        | {
            "modelId": constant(source.model_id),
            "layer": constant(source.id),
            "index": quoted(integers(latents.numbers)),
            "sourceSetName": constant(source.set_name),
            "creatorId": constant(config.creator_id),
            "maxActApprox": maximum,
            "hasVector": "false",
            "vectorLabel": "null",
            "vectorDefaultSteerStrength": maximum,
            "hookName": constant(hook_name),
            "topkCosSimIndices": arrays(integers(near.numbers("latent")), near.counts),
            "topkCosSimValues": arrays(numbers(near.numbers("cosine"), ROUNDED_DIGITS), near.counts),
            "frac_nonzero": numbers(latents.values("frequency"), MEASURED_DIGITS),
        }
    )


def token_texts(logits: Entries, text: SuiteText) -> pyarrow.Array:
    """The tokens of logits as JSON strings."""
    return text.tokens.take(pyarrow.array(logits.numbers("token")))


def _histogram(latents: LatentRange) -> dict[str, pyarrow.Array | str]:
    """Heights of bars, and the middles of their bins in units of activation; both are empty for a latent that never fires."""
    histogram = latents.histogram()
    bins = histogram.shape[1]
    counts = np.where(list_lengths(latents.batch.column("histogram")) > 0, bins, 0)
    is_there = counts > 0
    middles = (np.arange(bins) + 0.5) / max(bins, 1) * latents.values("max_activation").astype(np.float64)[is_there, None]
    return {
        "freq_hist_data_bar_heights": arrays(integers(histogram[is_there].ravel()), counts),
        "freq_hist_data_bar_values": arrays(numbers(middles.ravel(), MEASURED_DIGITS), counts),
    }


def _company(latents: LatentRange, firings: Int[np.ndarray, " all_latents"]) -> dict[str, pyarrow.Array | str]:
    """Latents that fire where this one does: Pearson's correlation and the cosine of the two, counting 1 where they fire."""
    company = entries(latents.batch, "cofiring")
    others = company.numbers("latent")
    is_known = (others >= 0) & (others < len(firings))
    company = company.where(is_known)
    products = firings[company.numbers("latent")].astype(np.float64) * firings[latents.numbers][company.rows]
    cosine = company.numbers("count") / np.sqrt(np.maximum(products, 1))
    return {
        "correlated_features_indices": arrays(integers(company.numbers("latent")), company.counts),
        "correlated_features_pearson": arrays(numbers(company.numbers("phi"), ROUNDED_DIGITS), company.counts),
        "correlated_features_l1": arrays(numbers(cosine, ROUNDED_DIGITS), company.counts),
    }


def activation_rows(
    latents: LatentRange, examples: Examples, text: SuiteText, source: NeuronpediaSource, config: NeuronpediaConfig
) -> pyarrow.Array:
    """A row for each example."""
    index = integers(latents.numbers[examples.latent])
    return objects(
        {
            "id": ids(source, ACTIVATION, latents.numbers[examples.latent], examples.number),
            "modelId": constant(source.model_id),
            "layer": constant(source.id),
            "index": quoted(index),
            "creatorId": constant(config.creator_id),
            "tokens": arrays(text.tokens.take(pyarrow.array(examples.tokens)), examples.lengths),
            "values": arrays(halves(examples.values), examples.lengths),
            "maxValue": halves(examples.maximum),
            "maxValueTokenIndex": integers(examples.maximum_at),
            "minValue": halves(examples.minimum),
            "qualifyingTokenIndex": integers(examples.own),
            "binMin": numbers(examples.bin_min, MEASURED_DIGITS),
            "binMax": numbers(examples.bin_max, MEASURED_DIGITS),
            "binContains": numbers(examples.bin_share, MEASURED_DIGITS),
            "dataSource": text.document_names(examples.block, examples.start + examples.own),
            "dataIndex": joined('"', integers(examples.block), ":", integers(examples.start), '"'),
            "dfaValues": "[]",
            "dfaTargetIndex": "null",
            "dfaMaxValue": "null",
            "lossValues": "[]",
            "logitContributions": "null",
        }
    )


def explanation_rows(labels: pyarrow.Table, source: NeuronpediaSource, config: NeuronpediaConfig) -> pyarrow.Array:
    """A row for each label. The scores stand in the notes: the importer takes no others, and our methods are not registered."""
    latents = np.asarray(labels["latent"], np.int64)
    first = np.searchsorted(latents, latents)
    return objects(
        {
            "id": ids(source, EXPLANATION, latents, np.arange(len(latents)) - first),
            "modelId": constant(source.model_id),
            "layer": constant(source.id),
            "index": quoted(integers(latents)),
            "authorId": constant(config.creator_id),
            "description": literals(labels["label"].to_pylist()),
            "typeName": constant(config.explanation_type),
            "explanationModelName": constant(config.explanation_model),
            "notes": literals(map(note, labels.to_pylist())),
        }
    )


def note(row: dict[str, Any]) -> str:
    """Who wrote a label and how well it predicts, in words."""
    parts = [f"by {row['method'] or 'an unknown method'}"]
    for score in ("detection", "fuzzing"):
        value, low, high, null = (row[f"{score}{suffix}"] for suffix in ("", "_low", "_high", "_null"))
        if value is not None:
            interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
            others = "" if null is None else f", labels of other latents {null:.2f}"
            parts.append(f"{score} {value:.2f}{interval}{others}")
    return "; ".join([*parts, "balanced accuracy on held-out documents"] if len(parts) > 1 else parts)


def ids(
    source: NeuronpediaSource, kind: str, latents: Int[np.ndarray, " rows"], numbers_: Int[np.ndarray, " rows"]
) -> pyarrow.Array:
    """Ids of 25 characters, quoted: they follow from source, latent and number alone, so that a second import changes nothing."""
    digest = int.from_bytes(hashlib.sha256(f"{source.model_id}/{source.id}".encode()).digest(), "big")
    front = f'"c{base36(digest, SOURCE_CHARACTERS)}{kind}'
    return joined(front, _base36_column(latents, LATENT_CHARACTERS), _base36_column(numbers_, NUMBER_CHARACTERS), '"')


def _base36_column(values: Int[np.ndarray, " rows"], length: int) -> pyarrow.Array:
    known, places = np.unique(values, return_inverse=True)
    return pyarrow.array(_spelt(known.tolist(), length), pyarrow.string()).take(pyarrow.array(places))


def _spelt(values: Iterable[int], length: int) -> list[str]:
    return [base36(value, length) for value in values]


def base36(value: int, length: int) -> str:
    """The last `length` digits of `value` to the base 36."""
    digits = ""
    for _ in range(length):
        value, digit = divmod(value, 36)
        digits = BASE36[digit] + digits
    return digits
