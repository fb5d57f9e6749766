"""What is exported of latents.parquet and explanations.parquet: read in small batches, checked, and never whole in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute as compute
from jaxtyping import Bool, Float, Int

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import unreadable
from everyscope.base.tables import UNREADABLE, opened_table, read_table
from everyscope.suite.latents import SCHEMA, UNLABELLED
from everyscope.suite.layout import LATENTS_FILE

REMEDY = "publish or download the suite again"
BATCH = 256
"""Rows taken at a time, which is the row group that describing writes [latents]."""
BATCH_TOKENS = 2**20
"""Tokens of examples taken at a time; batches with more are halved [tokens]."""
EXPORTED = (
    "latent",
    "firings",
    "frequency",
    "max_activation",
    "histogram",
    "examples",
    "top_logits",
    "bottom_logits",
    "neighbours",
    "cofiring",
)
COLUMNS = pyarrow.schema([SCHEMA.field(name) for name in EXPORTED])
"""The columns that are exported, and as what they are read."""
LABELS = pyarrow.schema(
    [
        ("latent", pyarrow.int32()),
        ("label", pyarrow.string()),
        ("method", pyarrow.string()),
        ("kind", pyarrow.string()),
        *(
            (f"{score}{suffix}", pyarrow.float32())
            for score in ("detection", "fuzzing")
            for suffix in ("", "_low", "_high", "_null")
        ),
    ]
)
"""The same of explanations.parquet."""


@dataclass(frozen=True, eq=False)
class Entries:
    """A column of lists of structs, flat."""

    counts: Int[np.ndarray, " rows"]
    """How many entries each row has."""
    fields: dict[str, pyarrow.Array]
    """The fields of all entries, row by row."""

    @property
    def rows(self) -> Int[np.ndarray, " entries"]:
        """The row of each entry."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def numbers(self, name: str) -> np.ndarray:
        """A field of numbers; null is 0."""
        return np.asarray(self.fields[name].fill_null(0))

    def where(self, is_kept: Bool[np.ndarray, " entries"]) -> "Entries":
        """The entries that are kept."""
        counts = np.bincount(self.rows[is_kept], minlength=len(self.counts))
        return Entries(counts, {name: field.filter(pyarrow.array(is_kept)) for name, field in self.fields.items()})

    def first(self, number: int) -> "Entries":
        """At most the first `number` entries of each row."""
        places = np.arange(self.counts.sum()) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return self.where(places < number)


def entries(batch: pyarrow.RecordBatch, name: str) -> Entries:
    """A column of lists of structs; a null list is empty."""
    column = batch.column(name)
    structs = column.flatten()
    fields = {field.name: structs.field(field.name) for field in structs.type}
    return Entries(list_lengths(column), fields)


def list_lengths(column: pyarrow.Array) -> Int[np.ndarray, " rows"]:
    """The length of each list; that of a null is 0."""
    return np.asarray(compute.call_function("list_value_length", [column]).fill_null(0), np.int64)


@dataclass(frozen=True, eq=False)
class LatentRange:
    """Some latents of one SAE, in order."""

    first: int
    """The number of the first."""
    batch: pyarrow.RecordBatch

    def __len__(self) -> int:
        """How many they are [latents]."""
        return self.batch.num_rows

    @property
    def numbers(self) -> Int[np.ndarray, " latents"]:
        """Their numbers in the SAE."""
        return np.arange(self.first, self.first + len(self))

    def values(self, name: str) -> Float[np.ndarray, " latents"]:
        """A column of numbers; null, as of a latent that never fires, is 0."""
        return np.asarray(self.batch.column(name).fill_null(0))

    def histogram(self) -> Int[np.ndarray, "latents bins"]:
        """Counts of activations in equal bins from 0 to the maximum; zeros where there is none."""
        column = self.batch.column("histogram")
        lengths = list_lengths(column)
        bins = int(lengths.max(initial=0))
        if np.any((lengths != 0) & (lengths != bins)):
            raise DamagedData(f"{LATENTS_FILE}: has histograms of different numbers of bins; describe and publish again")
        counts = np.zeros((len(self), bins), np.int64)
        counts[lengths > 0] = np.asarray(column.flatten()).reshape(-1, bins) if bins else 0
        return counts


def read_latents(path: Path, width: int) -> Iterator[LatentRange]:
    """The latents of an SAE, a few at a time.

    DataError where they are not described, DamagedData where the file cannot be read or has other rows than one a latent.
    """
    with opened_table(path, REMEDY) as file:
        if missing := [name for name in COLUMNS.names if name not in file.schema_arrow.names]:
            raise DataError(
                f"{path}: has no {missing[0]}, so its latents are not described; run `everyscope describe` and publish again"
            )
        if file.metadata.num_rows != width:
            raise DamagedData(f"{path}: holds {file.metadata.num_rows} latents, the SAE {width}; describe and publish again")
        first = 0
        try:
            for batch in file.iter_batches(BATCH, columns=COLUMNS.names):
                columns = [batch.column(field.name).cast(field.type) for field in COLUMNS]
                table = pyarrow.RecordBatch.from_arrays(columns, schema=COLUMNS)
                if not np.array_equal(table.column("latent"), np.arange(first, first + len(table))):
                    raise DamagedData(f"{path}: rows are not one per latent, in order; describe and publish again")
                yield from _halved(LatentRange(first, table))
                first += len(table)
        except UNREADABLE as error:
            raise damaged(path, error) from error


def _halved(latents: LatentRange) -> Iterator[LatentRange]:
    """The same, in parts with at most BATCH_TOKENS tokens of examples, or of one latent."""
    tokens = list_lengths(entries(latents.batch, "examples").fields["activations"]).sum()
    if tokens <= BATCH_TOKENS or len(latents) == 1:
        yield latents
        return
    middle = len(latents) // 2
    yield from _halved(LatentRange(latents.first, latents.batch.slice(0, middle)))
    yield from _halved(LatentRange(latents.first + middle, latents.batch.slice(middle)))


def read_firings(path: Path) -> Int[np.ndarray, " latents"]:
    """On how many tokens each latent fires."""
    return np.asarray(read_table(path, ["firings"], REMEDY)["firings"].fill_null(0), np.int64)


class Labels:
    """The explanations of an SAE, read along with its latents."""

    def __init__(self, path: Path | None) -> None:
        """None has no labels; DamagedData where the file cannot be read."""
        self._path, self._waiting, self._given = path, LABELS.empty_table(), 0
        file = None if path is None else opened_table(path, REMEDY)
        if file is not None and (missing := [name for name in LABELS.names if name not in file.schema_arrow.names]):
            raise DataError(f"{path}: has no column {missing[0]}; run `everyscope explain` and publish again")
        self._batches = iter(()) if file is None else file.iter_batches(BATCH, columns=LABELS.names)

    def until(self, last: int) -> pyarrow.Table:
        """The labels of latents below `last` that were not given yet; DamagedData where they are not in order of latent."""
        while not len(self._waiting) or np.asarray(self._waiting["latent"])[-1] < last:
            batch = self._next()
            if batch is None:
                break
            self._waiting = pyarrow.concat_tables([self._waiting, batch])
        latents = np.asarray(self._waiting["latent"])
        if np.any(np.diff(latents, prepend=self._given) < 0):
            raise DamagedData(f"{self._path}: is not in order of latent; run `everyscope explain` and publish again")
        self._given = last
        count = int(np.searchsorted(latents, last))
        given, self._waiting = self._waiting.slice(0, count), self._waiting.slice(count)
        has_label = compute.call_function("greater", [compute.call_function("utf8_length", [given["label"]]), pyarrow.scalar(0)])
        is_tokens = compute.call_function("is_in", [given["kind"]], compute.SetLookupOptions(pyarrow.array(UNLABELLED)))
        return given.filter(compute.call_function("and", [has_label, compute.call_function("invert", [is_tokens])]))

    def _next(self) -> pyarrow.Table | None:
        try:
            batch = next(self._batches, None)
            return None if batch is None else pyarrow.Table.from_batches([batch]).cast(LABELS)
        except UNREADABLE as error:
            assert self._path is not None
            raise damaged(self._path, error) from error


def damaged(path: Path, error: BaseException) -> DamagedData:
    """What to say of a Parquet file that Arrow cannot read."""
    return unreadable(path, "Parquet", error, REMEDY)
