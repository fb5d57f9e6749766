"""Building a suite's index from its files. One SAE that cannot be read is noted with its reason; the others stay usable."""

import itertools
import json
import math
import sqlite3
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_sealed
from everyscope.base.progress import say
from everyscope.base.table_trial import Tried
from everyscope.browse.latent_rows import EXPLANATIONS, REMEDY, flat, open_latents, read_columns
from everyscope.browse.postings import Matches, Postings
from everyscope.browse.slices import read_slices, read_splits
from everyscope.browse.tables import INDEXES, TABLES
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import LATENTS_FILE, METRICS_FILE
from everyscope.suite.records import SaeRecord, SuiteIndex

EXPLANATIONS_FILE = "explanations.parquet"
VOCABULARY_FILE, SEQUENCES_FILE, MODEL_FILE = "text/vocabulary.parquet", "text/sequences.parquet", "text/model.json"
LEVEL = 1
"""Of compression: a blob is read once for each time that it is written, and 1 is quick at both."""
TOP_TOKENS = 3
"""Tokens shown with a latent in tables [tokens]."""
SCALARS = ("firings", "frequency", "mean_activation", "max_activation", "token_entropy", "token_predictability")
Advance = Callable[[int], None]
"""Told how many more latents are in."""


def input_files(suite: Path, index: SuiteIndex) -> list[Path]:
    """Every file that `build_index` reads, there or not."""
    names = [VOCABULARY_FILE, SEQUENCES_FILE, MODEL_FILE]
    names += [f"{sae.folder}/{name}" for sae in index.saes for name in (METRICS_FILE, LATENTS_FILE, EXPLANATIONS_FILE)]
    return [suite / name for name in names] + sorted((suite / "slices").glob("*.json"))


def build_index(path: Path, suite: Path, index: SuiteIndex, advance: Advance) -> None:
    """Write the whole index into the new file `path`."""
    tables = Tried([file for file in input_files(suite, index) if file.suffix == ".parquet" and file.is_file()], REMEDY)
    database = sqlite3.connect(path)
    try:
        database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;" + TABLES)
        _write_text(database, suite, tables)
        first = 0
        matches = Matches()
        for number, record in enumerate(index.saes):
            _SaeWriter(database, suite, tables, number, record, first, matches).write(advance)
            first += record.width
        matches.write(database)
        numbers = {sae.folder: number for number, sae in enumerate(index.saes)}
        database.executemany("INSERT INTO splits VALUES (?, ?, ?, ?)", read_splits(suite, numbers))
        database.executemany("INSERT INTO slices VALUES (?, ?)", read_slices(suite))
        facts = {"index": json.dumps(index.model_copy(update={"saes": (), "files": {}}).as_json())}
        if (suite / MODEL_FILE).is_file():
            facts["model"] = json.dumps(read_sealed(suite / MODEL_FILE))
        database.executemany("INSERT INTO suite VALUES (?, ?)", facts.items())
        database.executescript(INDEXES)
        database.commit()
    finally:
        database.close()


def _write_text(database: sqlite3.Connection, suite: Path, tables: Tried) -> None:
    """Vocabulary and sequences, where the suite was described; a damaged file is said, and the pages go without text."""
    try:
        if (suite / VOCABULARY_FILE).is_file():
            tables.require(suite / VOCABULARY_FILE)
            kinds = {"token": pyarrow.int32(), "piece": pyarrow.binary(), "text": pyarrow.string(), "is_special": pyarrow.bool_()}
            rows = read_columns(suite / VOCABULARY_FILE, kinds).to_pylist()
            database.executemany("INSERT OR REPLACE INTO vocabulary VALUES (?, ?, ?, ?, ?)", map(_vocabulary_row, rows))
        if (suite / SEQUENCES_FILE).is_file():
            tables.require(suite / SEQUENCES_FILE)
            kinds = {
                "sequence": pyarrow.int32(),
                "split": pyarrow.string(),
                "first_document": pyarrow.string(),
                "input_ids": pyarrow.list_(pyarrow.int32()),
            }
            for batch in read_columns(suite / SEQUENCES_FILE, kinds).to_batches(1024):
                rows = batch.to_pylist()
                database.executemany("INSERT OR REPLACE INTO sequences VALUES (?, ?, ?, ?)", map(_sequence_row, rows))
    except DataError as error:
        say(f"  {error}")
        database.execute("INSERT OR REPLACE INTO suite VALUES ('text_problem', ?)", (_below(error, suite),))


def _vocabulary_row(row: dict[str, Any]) -> tuple[Any, ...]:
    text, raw = row.get("text") or "", row.get("piece") or b""
    return row["token"], raw, text, text.strip().lower(), bool(row.get("is_special"))


def _sequence_row(row: dict[str, Any]) -> tuple[Any, ...]:
    ids = np.asarray(row.get("input_ids") or [], np.int32)
    return row["sequence"], row.get("split"), row.get("first_document"), zlib.compress(ids.tobytes(), LEVEL)


def _below(error: DataError, suite: Path) -> str:
    """The error for a page: without the suite's own place on this machine, which an export would publish."""
    return str(error).replace(f"{suite}/", "")


class _SaeWriter:
    """Writes one SAE: its latents, their details, postings and matches, and last its own row."""

    def __init__(
        self,
        database: sqlite3.Connection,
        suite: Path,
        tables: Tried,
        number: int,
        record: SaeRecord,
        first: int,
        matches: Matches,
    ) -> None:
        self._database, self._suite, self._number, self._record, self._first = database, suite, number, record, first
        self._tables, self._matches, self._postings = tables, matches, Postings()
        self._shuffled = np.empty(0, np.int64)

    def write(self, advance: Advance) -> None:
        folder = self._suite / self._record.folder
        facts, schema, problem, is_described = "{}", b"", None, False
        labels: dict[int, dict[str, Any]] = {}
        written = 0
        try:
            labels = self._read_labels(folder / EXPLANATIONS_FILE)
            self._tables.require(folder / LATENTS_FILE)
            file = open_latents(folder / LATENTS_FILE, self._record.width)
            # A walk through all latents in an order that looks random and never changes; now that there are so many.
            self._shuffled = np.random.default_rng(self._number).permutation(self._record.width)
            facts, schema = file.facts, file.schema.serialize().to_pybytes()
            is_described = "examples" in file.schema.names
            for batch in file.batches():
                if batch.column("latent").to_pylist() != list(range(written, written + batch.num_rows)):
                    raise DamagedData(f"{file.path}: rows are not one per latent, in order; describe and publish again")
                self._write_batch(batch, labels)
                written += batch.num_rows
                advance(batch.num_rows)
        except DataError as error:
            problem = _below(error, self._suite)
            say(f"  {error}")
            advance(self._record.width - written)
        self._database.executemany(
            "INSERT INTO postings VALUES (?, ?, ?, ?, ?)",
            ((token, self._number, *arrays) for token, arrays in self._postings.packed()),
        )
        count = "SELECT count(*) FROM latents WHERE sae = ? AND firings > 0"
        (num_alive,) = self._database.execute(count, (self._number,)).fetchone()
        row = (self._number, self._record.folder, self._first, json.dumps(self._record.as_json()), self._metrics(folder), facts)
        self._database.execute(
            "INSERT INTO saes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *row,
                schema,
                is_described,
                num_alive,
                sum(label.get("kind") not in UNLABELLED for label in labels.values()),
                problem,
            ),
        )

    def _metrics(self, folder: Path) -> bytes | None:
        """metrics.json, compressed; None where it is missing or was changed, for the headline then stands in."""
        try:
            return zlib.compress(json.dumps(read_sealed(folder / METRICS_FILE)).encode(), LEVEL)
        except DataError as error:
            say(f"  {error}")
            return None

    def _read_labels(self, path: Path) -> dict[int, dict[str, Any]]:
        """By latent its label of best detection score, or its tokens where it has none; all of them go into their table."""
        if not path.is_file():
            return {}
        self._tables.require(path)
        found: dict[int, list[dict[str, Any]]] = {}
        for row in read_columns(path, EXPLANATIONS).to_pylist():
            if row.get("label") and 0 <= (row.get("latent") if row.get("latent") is not None else -1) < self._record.width:
                found.setdefault(row["latent"], []).append({name: _finite(value) for name, value in row.items()})
        for rows in found.values():
            rows.sort(key=lambda row: (row.get("kind") in UNLABELLED, -(row.get("detection") or 0.0)))
        self._database.executemany(
            "INSERT INTO explanations VALUES (?, ?)", ((self._first + latent, json.dumps(rows)) for latent, rows in found.items())
        )
        return {latent: rows[0] for latent, rows in found.items()}

    def _write_batch(self, batch: pyarrow.RecordBatch, labels: dict[int, dict[str, Any]]) -> None:
        latents = batch.column("latent").to_pylist()
        names = set(batch.schema.names)
        none = [None] * batch.num_rows
        scalars = [[_finite(value) for value in batch.column(name).to_pylist()] if name in names else none for name in SCALARS]
        top, nearest = self._lists(batch, names)
        chosen = [labels.get(latent, {}) for latent in latents]
        texts = [[label.get(name) for label in chosen] for name in ("label", "method", "kind", "detection", "fuzzing")]
        ids = [self._first + latent for latent in latents]
        shuffled = self._shuffled[latents].tolist()
        saes = [self._number] * batch.num_rows
        rows: Iterable[tuple[Any, ...]] = zip(ids, saes, latents, shuffled, *scalars, nearest, top, *texts, strict=True)
        self._database.executemany(f"INSERT INTO latents VALUES ({', '.join('?' * 17)})", rows)
        blobs = (zlib.compress(batch.slice(place, 1).serialize(), LEVEL) for place in range(batch.num_rows))
        self._database.executemany("INSERT INTO details VALUES (?, ?)", zip(ids, blobs, strict=True))

    def _lists(self, batch: pyarrow.RecordBatch, names: set[str]) -> tuple[list[bytes | None], list[float | None]]:
        """For each row its first tokens and its highest cosine within the SAE; postings and matches on the way."""
        latents = np.asarray(batch.column("latent"))
        top: list[bytes | None] = [None] * batch.num_rows
        nearest = np.full(batch.num_rows, np.nan, np.float32)
        if "tokens" in names:
            rows, fields = flat(batch, "tokens")
            self._postings.add(latents[rows], fields["token"], fields["share"], fields["count"])
            starts = np.searchsorted(rows, np.arange(batch.num_rows + 1))
            tokens = fields["token"].astype(np.int32)
            top = [tokens[start : min(start + TOP_TOKENS, stop)].tobytes() for start, stop in itertools.pairwise(starts)]
        if "neighbours" in names:
            rows, fields = flat(batch, "neighbours")
            is_same = fields["relation"] == 0
            np.fmax.at(nearest, rows[is_same], fields["cosine"][is_same])
            self._matches.add(self._number, latents[rows], fields)
        return top, [None if math.isnan(value) else value for value in nearest.tolist()]


def _finite(value: Any) -> Any:
    """`value`, or None where it is NaN or infinite: no such number is sorted or shown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
