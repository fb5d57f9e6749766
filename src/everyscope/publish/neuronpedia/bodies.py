"""Bodies for Neuronpedia's upload API: the features of an SAE, at most 128 and so many bytes in each, as files to be sent.

The API takes no latent without an example, and no histogram, neighbour or score: the bulk layout has those.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute as compute
from jaxtyping import Bool, Int

from everyscope.base.errors import DataError
from everyscope.base.files import whole_file
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.publish.neuronpedia.examples import Examples
from everyscope.publish.neuronpedia.json_columns import (
    MEASURED_DIGITS,
    ROUNDED_DIGITS,
    arrays,
    constant,
    halves,
    integers,
    literals,
    numbers,
    objects,
    shortened,
)
from everyscope.publish.neuronpedia.latents import LatentRange, entries
from everyscope.publish.neuronpedia.names import NeuronpediaSource
from everyscope.publish.neuronpedia.rows import token_texts
from everyscope.publish.neuronpedia.text import SuiteText

MAX_FEATURES = 128
"""Features that a body may have [features]."""
MAX_LOGITS = 20
"""Tokens that top and bottom logits may have [tokens]."""
MAX_LABEL = 512
"""Length of an explanation [characters]."""
MAX_INDEX = 10_000_000
"""The largest number that a latent may have."""
MAX_BIN = 99_999_999.0
"""The largest end of a bin."""
SPARE_BYTES = 2**17
"""Of a body, what a feature may take beside its examples [bytes]."""


def feature_objects(
    latents: LatentRange, examples: Examples, labels: pyarrow.Table, text: SuiteText, config: NeuronpediaConfig
) -> tuple[Int[np.ndarray, " features"], pyarrow.Array]:
    """The numbers of the latents that have examples, and a JSON object for each.

    Of examples that would not fit into one body the last are left out, which are the weakest.
    """
    each = _activation_objects(examples, text)
    is_kept = _fitting(each, examples, config.max_body_bytes - SPARE_BYTES)
    counts = np.bincount(examples.latent[is_kept], minlength=len(latents))
    objects_ = objects(
        {
            "index": integers(latents.numbers),
            "density": numbers(np.clip(latents.values("frequency").astype(np.float64), 0, 1), MEASURED_DIGITS),
            "topLogits": _logits(latents, "top_logits", text),
            "bottomLogits": _logits(latents, "bottom_logits", text),
            "explanations": _explanations(latents, labels, config),
            "activations": arrays(each.filter(pyarrow.array(is_kept)), counts),
        }
    )
    is_alive = counts > 0
    return latents.numbers[is_alive], objects_.filter(pyarrow.array(is_alive))


def _activation_objects(examples: Examples, text: SuiteText) -> pyarrow.Array:
    is_top = pyarrow.array(examples.bin_share < 0)
    share = numbers(np.clip(examples.bin_share, 0, 1), MEASURED_DIGITS)
    return objects(
        {
            "tokens": arrays(text.tokens.take(pyarrow.array(examples.tokens)), examples.lengths),
            "values": arrays(halves(examples.values), examples.lengths),
            "quantileMin": numbers(examples.bin_min, MEASURED_DIGITS),
            "quantileMax": numbers(np.minimum(examples.bin_max, MAX_BIN), MEASURED_DIGITS),
            "quantileFraction": compute.call_function("if_else", [is_top, pyarrow.scalar("null"), share]),
        }
    )


def _fitting(each: pyarrow.Array, examples: Examples, budget: int) -> Bool[np.ndarray, " examples"]:
    """Which examples of each latent, from its first on, fit into `budget` together [bytes]."""
    sizes = np.asarray(compute.call_function("binary_length", [each]), np.int64) + 1
    sums = np.cumsum(sizes)
    begins = np.cumsum(examples.counts) - examples.counts
    before = np.append(0, sums)[begins]
    return sums - np.repeat(before, examples.counts) <= budget


def _logits(latents: LatentRange, column: str, text: SuiteText) -> pyarrow.Array:
    logits = entries(latents.batch, column).first(MAX_LOGITS)
    each = objects({"token": token_texts(logits, text), "value": numbers(logits.numbers("value"), ROUNDED_DIGITS)})
    return arrays(each, logits.counts)


def _explanations(latents: LatentRange, labels: pyarrow.Table, config: NeuronpediaConfig) -> pyarrow.Array:
    texts = literals(shortened(label.replace("\0", " "), MAX_LABEL) for label in labels["label"].to_pylist())
    each = objects(
        {"text": texts, "methodName": constant(config.explanation_type), "modelName": constant(config.explanation_model)}
    )
    counts = np.bincount(np.asarray(labels["latent"], np.int64) - latents.first, minlength=len(latents))
    return arrays(each, counts)


@dataclass(frozen=True)
class Body:
    """One body on disk."""

    path: str
    """Below the folder of the export."""
    sha256: str
    """Of its bytes."""
    num_bytes: int
    """Its size [bytes]."""
    num_features: int
    """Features in it [features]."""
    first: int
    """The number of its first latent."""


class Bodies:
    """The bodies of one source, written as they become full."""

    def __init__(self, out: Path, source: NeuronpediaSource, config: NeuronpediaConfig) -> None:
        """Files go below `out`, into upload/<model>/<source>/."""
        self._out, self._folder = out, f"upload/{source.model_id}/{source.id}"
        self._end = f'],"modelId":{constant(source.model_id)},"source":{constant(source.id)}}}'.encode()
        self._limit = config.max_body_bytes
        self._waiting: list[bytes] = []
        self._numbers: list[int] = []
        self._size = 0
        self.written: list[Body] = []

    def add(self, latents: Int[np.ndarray, " features"], features: pyarrow.Array) -> None:
        """Take features with the numbers of their latents; DataError for one that the API cannot take."""
        frame = len(b'{"features":[') + len(self._end)
        for number, feature in zip(latents.tolist(), features.cast(pyarrow.binary()).to_pylist(), strict=True):
            if number > MAX_INDEX or len(feature) + frame > self._limit:
                raise DataError(
                    f"{self._folder}: latent {number} takes {len(feature)} bytes, a body holds {self._limit} and latents up to "
                    f"{MAX_INDEX}; raise --max-body-bytes"
                )
            if len(self._waiting) == MAX_FEATURES or self._size + len(feature) + 1 + frame > self._limit:
                self.flush()
            self._waiting.append(feature)
            self._numbers.append(number)
            self._size += len(feature) + 1

    def flush(self) -> None:
        """Write what is waiting, if anything is."""
        if not self._waiting:
            return
        path = f"{self._folder}/batch-{len(self.written):05d}.json"
        content = b'{"features":[' + b",".join(self._waiting) + self._end
        with whole_file(self._out / path) as partial:
            partial.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self.written.append(Body(path, digest, len(content), len(self._waiting), self._numbers[0]))
        self._waiting, self._numbers, self._size = [], [], 0
