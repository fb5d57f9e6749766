"""A described suite, one latent at a time: its examples with the text they point into, its logits and its labels.

Anybody may have made the tables: everything that leads from one to another is checked here (`DamagedData`), after
`base.table_trial` has read each of them in a process of its own.

The strongest examples of a latent are a group of their own. The others were drawn from fifths of its firings, and their bins are
those fifths: true quantiles, of firings alone. Where two fifths meet is read off the histogram (within a thirtieth of the
maximum) and then moved, where it must be, between the examples on both sides.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Int

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_sealed, unreadable
from everyscope.base.table_trial import Tried
from everyscope.base.tables import UNREADABLE, opened_table, read_table
from everyscope.publish.json_text import array, half, literal, shortened
from everyscope.suite.latents import SCHEMA, UNLABELLED
from everyscope.suite.layout import EXPLANATIONS_FILE, LATENTS_FILE, TEXT_FOLDER

REMEDY = "publish or download the suite again"
AGAIN = "describe and publish again"
SEQUENCES_FILE, VOCABULARY_FILE, MODEL_FILE = "sequences.parquet", "vocabulary.parquet", "model.json"
TOKEN_CHARACTERS, NAME_CHARACTERS = 100, 200
"""Lengths to which a token's text and a document's name are cut [characters]."""
BATCH = 256
"""Rows read at a time, the row group that describing writes [latents]."""
LATENT_COLUMNS = pyarrow.schema(
    SCHEMA.field(name)
    for name in (
        *("latent", "firings", "frequency", "max_activation", "histogram"),
        *("examples", "top_logits", "bottom_logits", "neighbours", "cofiring"),
    )
)
SCORES = [f"{score}{suffix}" for score in ("detection", "fuzzing") for suffix in ("", "_low", "_high", "_null")]
LABEL_COLUMNS = pyarrow.schema(
    [("latent", pyarrow.int32()), *((name, pyarrow.string()) for name in ("label", "method", "kind"))]
    + [(name, pyarrow.float32()) for name in SCORES]
)
FIFTHS = 5
MOST_TOKENS = 1 << 24
"""No vocabulary is as large [tokens]."""
MAX_TOKENS = 1024
"""Tokens of an example that Neuronpedia's API takes [tokens]."""
BEFORE = 0.6
"""Share of a window that is too long which is kept before its own token [1]."""


@dataclass(frozen=True, eq=False)
class SuiteText:
    """The vocabulary and all blocks of a suite."""

    tokens: list[str]
    """By id: the token's text as a JSON string. Bytes that are half a character are U+FFFD, and no text is empty."""
    blocks: list[Int[np.ndarray, " block"]]
    """The ids of each block's tokens."""
    documents: list[str]
    """Names of documents, block by block, as JSON strings."""
    starts: list[tuple[int, int]]
    """Block and position at which each of them begins."""
    num_layers: int
    d_model: int
    """Of the language model."""

    def document(self, block: int, position: int) -> str:
        """The name of the document at a place, as a JSON string; null where the suite does not say."""
        found = bisect_right(self.starts, (block, position)) - 1
        return self.documents[found] if found >= 0 and self.starts[found][0] == block else "null"


@dataclass(frozen=True)
class Example:
    """One example of a latent."""

    group: int
    """0 for the strongest, else the number of the fifth."""
    block: int
    start: int
    """Where in the text the window begins."""
    own: int
    """Place in the window of the token that the example was chosen for."""
    tokens: str
    """The window's tokens, as a JSON array."""
    activations: list[float]
    """At each of them, float16, from 0 on."""
    values: str
    """They as a JSON array."""
    bin_min: float
    bin_max: float
    bin_share: float
    """Share of the latent's firings in the bin; -1 for the strongest examples."""


@dataclass(frozen=True)
class Latent:
    """One latent of an SAE."""

    number: int
    row: dict[str, Any]
    """Its columns of latents.parquet; of one that never fires numbers are 0 and lists are empty."""
    examples: list[Example]
    labels: list[dict[str, Any]]
    """Its rows of explanations.parquet that hold a label."""

    def logits(self, column: str, text: SuiteText) -> list[tuple[str, float]]:
        """Token, as a JSON string, and value of top_logits or bottom_logits."""
        return [(text.tokens[entry["token"]], entry["value"]) for entry in self.row[column]]


def text_tables(suite: Path) -> list[Path]:
    """The tables that `read_text` reads, as far as they exist."""
    return _existing(suite / TEXT_FOLDER, VOCABULARY_FILE, SEQUENCES_FILE)


def latent_tables(home: Path) -> list[Path]:
    """The tables that `read_latents` reads of the SAE in `home`, as far as they exist."""
    return _existing(home, LATENTS_FILE, EXPLANATIONS_FILE)


def _existing(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def read_text(suite: Path, tables: Tried) -> SuiteText:
    """The text of a suite, whose `tables` were tried; DataError where it has none, DamagedData where it cannot be read."""
    folder = suite / TEXT_FOLDER
    for path in text_tables(suite):
        tables.require(path)
    for name in (VOCABULARY_FILE, SEQUENCES_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing, the suite is not described; run `everyscope describe` and publish again")
    tokens = _vocabulary(folder / VOCABULARY_FILE)
    table = read_table(folder / SEQUENCES_FILE, ["input_ids", "documents", "document_starts"], AGAIN)
    ids = table["input_ids"].combine_chunks()
    if ids.null_count or ids.flatten().null_count:
        raise DamagedData(f"{folder / SEQUENCES_FILE}: has a block or a token without a value; {AGAIN}")
    blocks = [np.asarray(block.values, np.int64) for block in ids]
    if any(len(ids) and not 0 <= ids.min() <= ids.max() < len(tokens) for ids in blocks):
        raise DataError(f"{folder / SEQUENCES_FILE}: has tokens beyond the vocabulary's {len(tokens)}; {AGAIN}")
    starts = table["document_starts"].to_pylist()
    if any(None in positions for positions in starts if positions):
        raise DamagedData(f"{folder / SEQUENCES_FILE}: has a document without a beginning; {AGAIN}")
    model = read_sealed(folder / MODEL_FILE, REMEDY)
    try:
        num_layers, d_model = int(model["num_layers"]), int(model["d_model"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / MODEL_FILE}: has no num_layers or no d_model; {AGAIN}") from error
    return SuiteText(
        tokens=tokens,
        blocks=blocks,
        documents=[
            literal(shortened(name or "", NAME_CHARACTERS)) for names in table["documents"].to_pylist() for name in names or ()
        ],
        starts=[(block, position) for block, positions in enumerate(starts) for position in positions or ()],
        num_layers=num_layers,
        d_model=d_model,
    )


def _vocabulary(path: Path) -> list[str]:
    table = read_table(path, ["token", "text"], AGAIN)
    ids = table["token"].to_pylist()
    if any(id_ is None or not 0 <= id_ < MOST_TOKENS for id_ in ids):
        raise DamagedData(f"{path}: has a token whose number is not in [0, {MOST_TOKENS}); {AGAIN}")
    texts = {
        id_: shortened(text or "⟨empty⟩", TOKEN_CHARACTERS) for id_, text in zip(ids, table["text"].to_pylist(), strict=True)
    }
    return [literal(texts.get(id_, f"⟨token {id_}⟩")) for id_ in range(max(ids, default=-1) + 1)]


def read_firings(home: Path) -> list[int]:
    """On how many tokens each latent of an SAE fires."""
    return read_table(home / LATENTS_FILE, ["firings"], REMEDY)["firings"].fill_null(0).to_pylist()


def read_latents(home: Path, width: int, text: SuiteText, has_labels: bool) -> Iterator[Latent]:
    """The latents of the SAE in `home`, in order, dead ones too.

    DataError where they are not described, DamagedData where a table cannot be read, has other rows than one a latent, or leads
    out of the text.
    """
    path = home / LATENTS_FILE
    labels = groupby(_labels(home / EXPLANATIONS_FILE) if has_labels else (), lambda label: label["latent"])
    at, its_labels = next(labels, (-1, ()))
    expected = 0
    for expected, row in enumerate(_rows(path, LATENT_COLUMNS, "describe", width)):
        if row["latent"] != expected:
            raise DamagedData(f"{path}: rows are not one per latent, in order; {AGAIN}")
        for column in ("examples", "top_logits", "bottom_logits", "neighbours", "cofiring"):
            if any(entry is None or None in entry.values() for entry in row[column]):
                raise DamagedData(f"{path}: latent {expected} has an entry without a value in {column}; {AGAIN}")
        if any(not 0 <= entry["token"] < len(text.tokens) for entry in chain(row["top_logits"], row["bottom_logits"])):
            raise DamagedData(
                f"{path}: latent {expected} has logits of tokens beyond the vocabulary's {len(text.tokens)}; {AGAIN}"
            )
        written = (entry["value"] for entry in chain(row["top_logits"], row["bottom_logits"]))
        if None in row["histogram"] or not all(map(math.isfinite, (row["frequency"], row["max_activation"], *written))):
            raise DamagedData(f"{path}: latent {expected} has a number that is missing, NaN or infinite; {AGAIN}")
        while -1 < at < expected:
            at, its_labels = next(labels, (-1, ()))
        own = [label for label in its_labels if label["label"] and label["kind"] not in UNLABELLED] if at == expected else []
        yield Latent(expected, row, _examples(row, text, path), own)


def _labels(path: Path) -> Iterator[dict[str, Any]]:
    last = 0
    for row in _rows(path, LABEL_COLUMNS, "explain"):
        if row["latent"] is None or row["latent"] < last:
            raise DamagedData(f"{path}: is not in order of latent; run `everyscope explain` and publish again")
        last = row["latent"]
        yield row


def _rows(path: Path, schema: pyarrow.Schema, stage: str, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table with the columns of `schema`; a null list is empty, a null count is 0."""
    lists = [field.name for field in schema if pyarrow.types.is_list(field.type)]
    counts = [name for name in ("firings", "frequency", "max_activation") if name in schema.names]
    with opened_table(path, REMEDY) as file:
        if missing := [name for name in schema.names if name not in file.schema_arrow.names]:
            raise DataError(f"{path}: has no column {missing[0]}; run `everyscope {stage}` and publish again")
        if count is not None and file.metadata.num_rows != count:
            raise DamagedData(f"{path}: holds {file.metadata.num_rows} latents, the SAE {count}; {AGAIN}")
        try:
            for batch in file.iter_batches(BATCH, columns=schema.names):
                batch = batch.select(schema.names).cast(schema)
                for values in zip(*(map(_python, batch[name]) for name in schema.names), strict=True):
                    row = dict(zip(schema.names, values, strict=True))
                    yield row | {name: row[name] or [] for name in lists} | {name: row[name] or 0 for name in counts}
        except UNREADABLE as error:
            raise unreadable(path, "Parquet", error, REMEDY) from error


def _python(scalar: Any) -> Any:
    """What `as_py` gives, with the activations of examples by way of numpy, which takes a tenth of the time."""
    if not isinstance(scalar, pyarrow.ListScalar) or "activations" not in str(scalar.type) or not len(scalar.values or ()):
        return scalar.as_py()
    fields = dict(zip(scalar.values.type.names, scalar.values.flatten(), strict=True))
    lists = fields.pop("activations")
    if lists.null_count or lists.flatten().null_count:
        return scalar.as_py()
    values = np.split(lists.flatten().to_numpy(zero_copy_only=False), np.cumsum(lists.value_lengths())[:-1])
    columns = [fields[name].to_pylist() for name in fields]
    return [
        dict(zip([*fields, "activations"], its, strict=True)) for its in zip(*columns, (v.tolist() for v in values), strict=True)
    ]


def _examples(row: dict[str, Any], text: SuiteText, path: Path) -> list[Example]:
    """The examples of a row of latents.parquet; DamagedData, which calls the file `path`, where they lead out of the text."""
    for its in row["examples"]:
        block, start, values = its["sequence"], its["start"], its["activations"]
        own = its["position"] - start
        is_inside = 0 <= block < len(text.blocks) and start >= 0 and start + len(values) <= len(text.blocks[block])
        is_value = 0 <= own < len(values) and None not in values and min(values) >= 0 and math.isfinite(sum(values))
        if not (is_inside and is_value and 0 <= its["group"] <= FIFTHS):
            raise DamagedData(f"{path}: has examples outside of the text, or values that are none; {AGAIN}")
    firings, bounds = row["firings"], _bounds(row)
    cuts = [_cut(its["position"] - its["start"], len(its["activations"])) for its in row["examples"]]
    shown = [its["activations"][cut : cut + MAX_TOKENS] for its, cut in zip(row["examples"], cuts, strict=True)]
    highest = _rounded_up(max([row["max_activation"], bounds[0], *map(max, shown)]))
    found = []
    for its, cut, values in zip(row["examples"], cuts, shown, strict=True):
        block, group, start = its["sequence"], its["group"], its["start"] + cut
        tokens = array([text.tokens[token] for token in text.blocks[block][start : start + len(values)].tolist()])
        share = (group * firings // FIFTHS - (group - 1) * firings // FIFTHS) / max(firings, 1)
        its_bin = (bounds[group], bounds[group - 1], share) if group else (-1.0, highest, -1.0)
        spelt = array(map(half, values))
        found.append(Example(group, block, start, its["position"] - start, tokens, values, spelt, *its_bin))
    return found


def _cut(own: int, length: int) -> int:
    """Where to begin a window of `length` tokens of which at most MAX_TOKENS are shown, `own` among them."""
    return min(max(own - int(BEFORE * MAX_TOKENS), 0), max(length - MAX_TOKENS, 0))


def _bounds(row: dict[str, Any]) -> list[float]:
    """The values between which a latent's fifths lie, strongest first [6]."""
    below, bounds = [0, *accumulate(row["histogram"])], list[float]()
    bins, total = max(len(row["histogram"]), 1), below[-1]
    own = [(its["group"], its["activations"][its["position"] - its["start"]]) for its in row["examples"] if its["group"]]
    for number in range(FIFTHS + 1):
        wanted = total - number * total // FIFTHS
        reached = bisect_left(below, wanted, 1) if number < FIFTHS else bisect_right(below, 0, 1)
        edge = min(reached, bins) - 1
        inside = (wanted - below[edge]) / max(below[edge + 1] - below[edge], 1) if row["histogram"] else 0.0
        bound = (edge + min(max(inside, 0.0), 1.0)) / bins * row["max_activation"]
        highest = max((value for group, value in own if group > number), default=-math.inf)
        lowest = min((value for group, value in own if group <= number), default=math.inf)
        bounds.append(min(max(bound, highest), max(lowest, highest), bounds[-1] if bounds else math.inf))
    return bounds


def _rounded_up(value: float) -> float:
    """A value above 0 with 4 significant digits, never less than it was: a bin above which there is nothing."""
    size = 10.0 ** (3 - math.floor(math.log10(value if value > 0 else 1.0)))
    return math.ceil(value * size - 1e-9) / size
