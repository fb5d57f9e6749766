"""What is written of a latent: its rows of the bulk layout (features, activations, explanations), and its object for the API.

The fields are those of Neuronpedia's tables, which its importer takes from the first line of each file: so every row has them
all, and what a suite does not measure (alignment with neurons, histograms of logits) is empty. Rows carry no date, so that
equal suites give equal bytes; the importing database dates them.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from everyscope.publish.described import Example, Latent, SuiteText
from everyscope.publish.json_text import (
    MEASURED_DIGITS,
    ROUNDED_DIGITS,
    array,
    encoded,
    half,
    integers,
    json_object,
    literal,
    number,
    numbers,
    shortened,
)
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.names import NeuronpediaSource

SAME_SAE = 0
"""The relation of neighbours in the same SAE, as docs/reference/latents.md numbers them."""
UNMEASURED = (
    *("vector", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices"),
    *("correlated_neurons_pearson", "correlated_neurons_l1", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    "decoder_weights_dist",
)
"""Fields of features that stay empty."""
MAX_LOGITS = 20
"""Tokens that top and bottom logits may have in the API [tokens]."""
MAX_LABEL = 512
"""Length of an explanation there [characters]."""
MAX_BIN = 99_999_999.0
"""The largest end of a bin there."""
SPARE_BYTES = 2**17
"""Of a body, what a feature may take beside its examples [bytes]."""


class Rows:
    """Writes the latents of one source."""

    def __init__(
        self, text: SuiteText, source: NeuronpediaSource, config: NeuronpediaConfig, hook_name: str, firings: Sequence[int]
    ) -> None:
        """`firings` are those of all latents of the SAE."""
        self._text, self._config, self._firings = text, config, firings
        digest = int.from_bytes(hashlib.sha256(f"{source.model_id}/{source.id}".encode()).digest(), "big")
        self._id = f"c{base36(digest, 13)}"
        self._own = {"modelId": encoded(source.model_id), "layer": encoded(source.id)}
        self._creator = {"creatorId": encoded(config.creator_id)}
        self._names = {"sourceSetName": encoded(source.set_name), "hookName": encoded(hook_name)}

    def feature(self, latent: Latent) -> str:
        """The row of a latent."""
        row, maximum = latent.row, number(latent.row["max_activation"], MEASURED_DIGITS)
        near = [its for its in row["neighbours"] if its["relation"] == SAME_SAE]
        fields = dict.fromkeys(UNMEASURED, "[]") | self._own | self._creator | self._names | self._cofiring(latent)
        for name, column in (("pos", "top_logits"), ("neg", "bottom_logits")):
            logits = latent.logits(column, self._text)
            fields[f"{name}_str"] = array(token for token, _ in logits)
            fields[f"{name}_values"] = numbers((value for _, value in logits), ROUNDED_DIGITS)
        bins = len(row["histogram"])
        middles = ((place + 0.5) / bins * row["max_activation"] for place in range(bins))
        return json_object(
            fields
            | {
                "index": f'"{latent.number}"',
                "maxActApprox": maximum,
                "hasVector": "false",
                "vectorLabel": "null",
                "vectorDefaultSteerStrength": maximum,
                "topkCosSimIndices": integers(its["latent"] for its in near),
                "topkCosSimValues": numbers((its["cosine"] for its in near), ROUNDED_DIGITS),
                "frac_nonzero": number(row["frequency"], MEASURED_DIGITS),
                "freq_hist_data_bar_heights": integers(row["histogram"]),
                "freq_hist_data_bar_values": numbers(middles, MEASURED_DIGITS),
            }
        )

    def _cofiring(self, latent: Latent) -> dict[str, str]:
        """Latents that fire where this one does: Pearson's correlation and the cosine of the two, counting 1 where they fire."""
        others = [its for its in latent.row["cofiring"] if 0 <= its["latent"] < len(self._firings)]
        own = self._firings[latent.number]
        cosines = (its["count"] / math.sqrt(max(own * self._firings[its["latent"]], 1)) for its in others)
        return {
            "correlated_features_indices": integers(its["latent"] for its in others),
            "correlated_features_pearson": numbers((its["phi"] for its in others), ROUNDED_DIGITS),
            "correlated_features_l1": numbers(cosines, ROUNDED_DIGITS),
        }

    def activations(self, latent: Latent) -> list[str]:
        """A row for each example."""
        return [self._activation(latent.number, place, example) for place, example in enumerate(latent.examples)]

    def _activation(self, latent: int, place: int, example: Example) -> str:
        highest = max(example.activations)
        return json_object(
            self._own
            | self._creator
            | {
                "id": self._row_id("a", latent, place),
                "index": f'"{latent}"',
                "tokens": example.tokens,
                "values": example.values,
                "maxValue": half(highest),
                "maxValueTokenIndex": str(example.activations.index(highest)),
                "minValue": half(min(example.activations)),
                "qualifyingTokenIndex": str(example.own),
                "binMin": number(example.bin_min, MEASURED_DIGITS),
                "binMax": number(example.bin_max, MEASURED_DIGITS),
                "binContains": number(example.bin_share, MEASURED_DIGITS),
                "dataSource": self._text.document(example.block, example.start + example.own),
                "dataIndex": f'"{example.block}:{example.start}"',
                "dfaValues": "[]",
                "dfaTargetIndex": "null",
                "dfaMaxValue": "null",
                "lossValues": "[]",
                "logitContributions": "null",
            }
        )

    def explanations(self, latent: Latent) -> list[str]:
        """A row for each label. Scores are in the notes: the importer takes no others, and our methods are not registered."""
        return [
            json_object(
                self._own
                | {
                    "id": self._row_id("e", latent.number, place),
                    "index": f'"{latent.number}"',
                    "authorId": self._creator["creatorId"],
                    "description": literal(label["label"]),
                    "typeName": encoded(self._config.explanation_type),
                    "explanationModelName": encoded(self._config.explanation_model),
                    "notes": literal(note(label)),
                }
            )
            for place, label in enumerate(latent.labels)
        ]

    def _row_id(self, kind: str, latent: int, place: int) -> str:
        """An id of 25 characters that follows from source, latent and number alone: a second import changes nothing."""
        return f'"{self._id}{kind}{base36(latent, 6)}{base36(place, 4)}"'

    def for_api(self, latent: Latent) -> str | None:
        """The latent for the upload API; None without an example. The weakest examples are left out if a body cannot hold all."""
        activations, left = list[str](), self._config.max_body_bytes - SPARE_BYTES
        for example in latent.examples:
            activations.append(self._api_activation(example))
            left -= len(activations[-1].encode()) + 1
            if left < 0:
                activations.pop()
                break
        kind, model = encoded(self._config.explanation_type), encoded(self._config.explanation_model)
        labels = [literal(shortened(label["label"].replace("\0", " "), MAX_LABEL)) for label in latent.labels]
        fields = {
            "index": str(latent.number),
            "density": number(min(max(latent.row["frequency"], 0), 1), MEASURED_DIGITS),
            "explanations": array(json_object({"text": text, "methodName": kind, "modelName": model}) for text in labels),
            "activations": array(activations),
        }
        for name, column in (("topLogits", "top_logits"), ("bottomLogits", "bottom_logits")):
            logits = latent.logits(column, self._text)[:MAX_LOGITS]
            fields[name] = array(json_object({"token": token, "value": number(value, ROUNDED_DIGITS)}) for token, value in logits)
        return json_object(fields) if activations else None

    def _api_activation(self, example: Example) -> str:
        share = number(min(example.bin_share, 1.0), MEASURED_DIGITS)
        return json_object(
            {
                "tokens": example.tokens,
                "values": example.values,
                "quantileMin": number(example.bin_min, MEASURED_DIGITS),
                "quantileMax": number(min(example.bin_max, MAX_BIN), MEASURED_DIGITS),
                "quantileFraction": "null" if example.bin_share < 0 else share,
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


def base36(value: int, length: int) -> str:
    """The last `length` digits of `value` to the base 36."""
    return np.base_repr(value % 36**length, 36).lower().zfill(length)
