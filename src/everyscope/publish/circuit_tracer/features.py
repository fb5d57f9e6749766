"""Feature files of circuit-tracer's viewer: for each layer, a file of one compressed JSON object a latent, and where each begins.

The viewer asks for the bytes of one latent, reads the first four as the length of what follows (little-endian), and inflates that
much: so the files are no plain concatenation of gzips. index.json.gz has, by layer, the file's name and width + 1 offsets. Equal
tables give equal bytes.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from everyscope.base.files import whole_file
from everyscope.base.progress import Meter
from everyscope.publish.described import Example, Latent, SuiteText, read_latents
from everyscope.publish.json_text import MEASURED_DIGITS, array, encoded, integers, json_object, literal, number, numbers

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
    folder: Path, layer: int, home: Path, width: int, text: SuiteText, has_labels: bool, scan: str, progress: Meter
) -> Layer:
    """Write layer_<n>.bin from the tables of the coder in `home`.

    DataError where latents are not described, DamagedData where tables cannot be read or point outside of the text.
    """
    written = Layer(f"layer_{layer}.bin", [0], {})
    with whole_file(folder / written.file) as partial, partial.open("wb") as file:
        for latent in read_latents(home, width, text, has_labels):
            row = feature_row(latent, text, f"{scan}/layer_{layer}")
            packed = gzip.compress(row.encode(), LEVEL, mtime=0)
            file.write(len(packed).to_bytes(LENGTH_BYTES, "little") + packed)
            written.offsets.append(written.offsets[-1] + LENGTH_BYTES + len(packed))
            if (label := first_label(latent)) is not None:
                written.labels[str(latent.number)] = label
            progress.advance(1)
    return written


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


def first_label(latent: Latent) -> str | None:
    """The first label of a latent; None where it has none."""
    return latent.labels[0]["label"].replace("\0", " ") if latent.labels else None  # as all texts here


def feature_row(latent: Latent, text: SuiteText, name: str) -> str:
    """A JSON object for a latent, dead ones too; `label` is beyond what the viewer asks for."""
    row, label = latent.row, first_label(latent)
    is_alive = sum(row["histogram"]) > 0
    return json_object(
        {
            "transcoder_id": encoded(name),
            "index": str(latent.number),
            "label": encoded(label),
            "examples_quantiles": _quantiles(latent.examples),
            "top_logits": array(token for token, _ in latent.logits("top_logits", text)),
            "bottom_logits": array(token for token, _ in latent.logits("bottom_logits", text)),
            "act_min": "0.0",  # where the histogram begins: the viewer finds an activation's bar between the two
            "act_max": number(row["max_activation"], MEASURED_DIGITS),
            "quantile_values": numbers(percentiles(row["histogram"], row["max_activation"]), MEASURED_DIGITS),
            "histogram": integers(row["histogram"] if is_alive else ()),
            "activation_frequency": number(row["frequency"], MEASURED_DIGITS),
        }
    )


def percentiles(histogram: Sequence[int], maximum: float) -> list[float]:
    """The activations at 1, 2, ..., 100 % of a latent's firings, from its histogram, even within a bin; none of a dead one."""
    below = np.concatenate([[0.0], np.cumsum(histogram)])
    if not below[-1]:
        return []
    # of a run of empty bins, its beginning: the first place at which so many firings lie below
    places, first = np.unique(below, return_index=True)
    last = np.append(first[1:] - 1, len(histogram))
    wanted = below[-1] * np.arange(1, PERCENTILES + 1) / PERCENTILES
    upper = np.searchsorted(places, wanted, "left")
    low, high = places[upper - 1], places[upper]
    return ((last[upper - 1] + (wanted - low) / (high - low)) / len(histogram) * maximum).tolist()


def _quantiles(examples: list[Example]) -> str:
    """An array of groups, strongest first, each with its examples. A place of the text that comes again is drawn pale."""
    seen, rows = set[tuple[int, int]](), list[tuple[int, str]]()
    for example in examples:
        place = (example.block, example.start + example.own)
        fields = {"tokens": example.tokens, "tokens_acts_list": example.values, "train_token_ind": str(example.own)}
        rows.append((example.group, json_object({**fields, "is_repeated_datapoint": encoded(place in seen)})))
        seen.add(place)
    groups = groupby(sorted(rows, key=lambda row: row[0]), lambda row: row[0])
    return array(
        f'{{"quantile_name":{literal(GROUPS[group])},"examples":{array(row for _, row in its)}}}' for group, its in groups
    )
