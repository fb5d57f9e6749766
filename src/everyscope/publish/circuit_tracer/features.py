"""Feature files of circuit-tracer's viewer: for each layer, a file of one compressed JSON object a latent, and where each begins.

The viewer asks for the bytes of one latent, reads the first four as the length of what follows (little-endian), and inflates that
much: so the files are no plain concatenation of gzips. index.json.gz has, by layer, the file's name and width + 1 offsets. Equal
tables give equal bytes.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Float, Int

from everyscope.base.files import whole_file
from everyscope.publish.neuronpedia.examples import Examples, read_examples
from everyscope.publish.neuronpedia.json_columns import (
    MEASURED_DIGITS,
    arrays,
    constant,
    halves,
    integers,
    joined,
    literals,
    numbers,
    objects,
)
from everyscope.publish.neuronpedia.latents import Labels, LatentRange, entries, read_latents
from everyscope.publish.neuronpedia.rows import token_texts
from everyscope.publish.neuronpedia.text import SuiteText

INDEX_FILE, LABELS_FILE = "index.json.gz", "labels.json"
LENGTH_BYTES = 4
"""Of the number before each compressed object [bytes]."""
LEVEL = 6
"""Of compression."""
GROUPS = (
    "Top activations",
    "Strongest fifth of firings",
    "Second fifth of firings",
    "Middle fifth of firings",
    "Fourth fifth of firings",
    "Weakest fifth of firings",
)
"""Headings, by the group of examples."""
PERCENTILES = 100


@dataclass(frozen=True)
class Layer:
    """What is written of one layer."""

    file: str
    offsets: list[int]
    labels: dict[str, str]
    """By latent."""


def write_layer(
    folder: Path, layer: int, table: Path, explanations: Path | None, width: int, text: SuiteText, scan: str
) -> Iterator[int | Layer]:
    """Write layer_<n>.bin from a table of latents; gives the number of latents after each batch, and last what was written.

    DataError where latents are not described, DamagedData where tables cannot be read or point outside of the text.
    """
    labels, known, offsets = Labels(explanations), dict[str, str](), [0]
    path = folder / f"layer_{layer}.bin"
    with whole_file(path) as partial, partial.open("wb") as file:
        for latents in read_latents(table, width):
            shown_labels = _first_labels(latents, labels.until(latents.first + len(latents)))
            rows = feature_rows(latents, read_examples(latents, text, table), shown_labels, text, f"{scan}/layer_{layer}")
            for row in rows.cast(pyarrow.binary()).to_pylist():
                packed = gzip.compress(row, LEVEL, mtime=0)
                file.write(len(packed).to_bytes(LENGTH_BYTES, "little") + packed)
                offsets.append(offsets[-1] + LENGTH_BYTES + len(packed))
            known |= {
                str(latent): label
                for latent, label in zip(latents.numbers.tolist(), shown_labels, strict=True)
                if label is not None
            }
            yield len(latents)
    yield Layer(path.name, offsets, known)


def write_index(folder: Path, layers: list[Layer]) -> None:
    """index.json.gz, and the labels by layer and latent, once all layers are written."""
    with whole_file(folder / LABELS_FILE) as partial:
        partial.write_text(json.dumps({str(layer): one.labels for layer, one in enumerate(layers)}, indent=1) + "\n", "utf-8")
    index = {str(layer): {"filename": one.file, "offsets": one.offsets} for layer, one in enumerate(layers)}
    with whole_file(folder / INDEX_FILE) as partial:
        partial.write_bytes(gzip.compress(json.dumps(index, separators=(",", ":")).encode(), LEVEL, mtime=0))


def read_feature(folder: Path, layer: int, latent: int) -> dict[str, Any]:
    """What the viewer reads of a latent, the way in which it reads it."""
    index = json.loads(gzip.decompress((folder / INDEX_FILE).read_bytes()))[str(layer)]
    begin, end = index["offsets"][latent : latent + 2]
    with (folder / index["filename"]).open("rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    return json.loads(gzip.decompress(data[LENGTH_BYTES : LENGTH_BYTES + length]))


def _first_labels(latents: LatentRange, table: pyarrow.Table) -> list[str | None]:
    """The first label of each latent; None where it has none."""
    first: dict[int, str] = {}
    for latent, label in zip(table["latent"].to_pylist(), table["label"].to_pylist(), strict=True):
        first.setdefault(latent, label.replace("\0", " "))  # as all texts here
    return [first.get(latent) for latent in latents.numbers.tolist()]


def feature_rows(latents: LatentRange, examples: Examples, labels: list[str | None], text: SuiteText, name: str) -> pyarrow.Array:
    """A JSON object for each latent, dead ones too; `label` is beyond what the viewer asks for."""
    top, bottom = (entries(latents.batch, f"{side}_logits") for side in ("top", "bottom"))
    histogram, maximum = latents.histogram(), latents.values("max_activation").astype(np.float64)
    is_alive = histogram.sum(1) > 0
    bins = np.where(is_alive, histogram.shape[1], 0)
    levels = percentiles(histogram, maximum)[is_alive]
    return objects(
        {
            "transcoder_id": constant(name),
            "index": integers(latents.numbers),
            "label": literals_or_null(labels),
            "examples_quantiles": _quantiles(examples, text),
            "top_logits": arrays(token_texts(top, text), top.counts),
            "bottom_logits": arrays(token_texts(bottom, text), bottom.counts),
            "act_min": "0.0",  # where the histogram begins: the viewer finds an activation's bar between the two
            "act_max": numbers(maximum, MEASURED_DIGITS),
            "quantile_values": arrays(numbers(levels.ravel(), MEASURED_DIGITS), np.where(is_alive, PERCENTILES, 0)),
            "histogram": arrays(integers(histogram[is_alive].ravel()), bins),
            "activation_frequency": numbers(latents.values("frequency"), MEASURED_DIGITS),
        }
    )


def literals_or_null(texts: list[str | None]) -> pyarrow.Array:
    """JSON strings, and null where there is no text."""
    spelt = literals(text or "" for text in texts).to_pylist()
    return pyarrow.array([one if text is not None else "null" for one, text in zip(spelt, texts, strict=True)], pyarrow.string())


def percentiles(
    histogram: Int[np.ndarray, "latents bins"], maximum: Float[np.ndarray, " latents"]
) -> Float[np.ndarray, "latents 100"]:
    """The activations at 1, 2, ..., 100 % of a latent's firings, from its histogram, even within a bin; 0 for a dead one."""
    latents, bins = histogram.shape
    below = np.concatenate([np.zeros((latents, 1)), np.cumsum(histogram, axis=1)], axis=1)
    wanted = below[:, -1:] * np.arange(1, PERCENTILES + 1) / PERCENTILES
    found = np.zeros((latents, PERCENTILES))
    for row in np.flatnonzero(below[:, -1] > 0):
        # of a run of empty bins, its beginning: the first place at which so many firings lie below
        places, first = np.unique(below[row], return_index=True)
        last = np.append(first[1:] - 1, bins)
        upper = np.searchsorted(places, wanted[row], "left")
        low, high = places[upper - 1], places[upper]
        found[row] = (last[upper - 1] + (wanted[row] - low) / (high - low)) / bins * maximum[row]
    return found


def _quantiles(examples: Examples, text: SuiteText) -> pyarrow.Array:
    """For each latent an array of groups, strongest first, each with its examples."""
    order = np.lexsort([np.arange(len(examples.group)), examples.group, examples.latent])
    each = _examples(examples, text).take(pyarrow.array(order))
    keys = (examples.latent * len(GROUPS) + examples.group)[order]
    groups, counts = np.unique(keys, return_counts=True)
    headings = literals(GROUPS[group] for group in (groups % len(GROUPS)).tolist())
    quantiles = joined('{"quantile_name":', headings, ',"examples":', arrays(each, counts), "}")
    return arrays(quantiles, np.bincount(groups // len(GROUPS), minlength=len(examples.counts)))


def _examples(examples: Examples, text: SuiteText) -> pyarrow.Array:
    """A JSON object for each example. A place of the text that one before it was chosen for as well is drawn pale."""
    places = np.stack([examples.latent, examples.block, examples.start + examples.own], axis=1)
    is_repeated = np.ones(len(places), bool)
    is_repeated[np.unique(places, axis=0, return_index=True)[1] if len(places) else []] = False
    return objects(
        {
            "tokens": arrays(text.tokens.take(pyarrow.array(examples.tokens)), examples.lengths),
            "tokens_acts_list": arrays(halves(examples.values), examples.lengths),
            "train_token_ind": integers(examples.own),
            "is_repeated_datapoint": pyarrow.array(np.where(is_repeated, "true", "false")),
        }
    )
