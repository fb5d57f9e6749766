"""Building the index's databases from a suite's files: one of its text, one for each SAE.

An SAE that cannot be read gets a database too, which holds the reason; the others stay usable.
"""

import itertools
import json
import math
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.progress import say
from everyscope.base.table_trial import Tried
from everyscope.browse.latent_rows import EXPLANATIONS, flat, open_latents, read_columns
from everyscope.browse.postings import Matches, Postings
from everyscope.browse.tables import SAE_INDEXES, SAE_TABLES, TEXT_INDEXES, TEXT_TABLES
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import EXPLANATIONS_FILE, LATENTS_FILE
from everyscope.suite.records import SaeRecord

VOCABULARY_FILE, SEQUENCES_FILE = "text/vocabulary.parquet", "text/sequences.parquet"
LEVEL = 1
"""Of compression: a blob is read once for each time that it is written, and 1 is quick at both."""
TOP_TOKENS = 3
"""Tokens shown with a latent in tables [tokens]."""
SCALARS = ("firings", "frequency", "mean_activation", "max_activation", "token_entropy", "token_predictability")
LISTS = ("tokens", "neighbours", "examples.sequence", "examples.position")
Advance = Callable[[int], None]
"""Called with the number of latents added."""


def sae_files(suite: Path, record: SaeRecord) -> list[Path]:
    """Every file that an SAE's database is made of, there or not."""
    return [suite / record.folder / name for name in (LATENTS_FILE, EXPLANATIONS_FILE)]


def text_files(suite: Path) -> list[Path]:
    """Every file that the text's database is made of, there or not."""
    return [suite / name for name in (VOCABULARY_FILE, SEQUENCES_FILE)]


@contextmanager
def _database(path: Path, tables: str, indexes: str) -> Iterator[sqlite3.Connection]:
    """The new database `path`, complete with its indexes at the end."""
    database = sqlite3.connect(path)
    try:
        database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-65536;" + tables)
        yield database
        database.executescript(indexes)
        database.commit()
    finally:
        database.close()


def build_text(path: Path, suite: Path, tables: Tried) -> None:
    """Write vocabulary and sequences into the new file `path`; a damaged file is said, and the pages go without text."""
    with _database(path, TEXT_TABLES, TEXT_INDEXES) as database:
        try:
            _write_vocabulary(database, suite / VOCABULARY_FILE, tables)
            _write_sequences(database, suite / SEQUENCES_FILE, tables)
        except DataError as error:
            say(f"  {error}")
            database.execute("INSERT INTO facts VALUES ('problem', ?)", (below(error, suite),))


def _write_vocabulary(database: sqlite3.Connection, path: Path, tables: Tried) -> None:
    if path.is_file():
        tables.require(path)
        kinds = {"token": pyarrow.int32(), "piece": pyarrow.binary(), "text": pyarrow.string(), "is_special": pyarrow.bool_()}
        rows = read_columns(path, kinds).to_pylist()
        database.executemany("INSERT OR REPLACE INTO vocabulary VALUES (?, ?, ?, ?, ?)", map(_vocabulary_row, rows))


def _write_sequences(database: sqlite3.Connection, path: Path, tables: Tried) -> None:
    if path.is_file():
        tables.require(path)
        kinds = {
            "sequence": pyarrow.int32(),
            "split": pyarrow.string(),
            "first_document": pyarrow.string(),
            "input_ids": pyarrow.list_(pyarrow.int32()),
        }
        for batch in read_columns(path, kinds).to_batches(1024):
            database.executemany("INSERT OR REPLACE INTO sequences VALUES (?, ?, ?, ?)", map(_sequence_row, batch.to_pylist()))


def _vocabulary_row(row: dict[str, Any]) -> tuple[Any, ...]:
    text, raw = row.get("text") or "", row.get("piece") or b""
    return row["token"], raw, text, text.strip().lower(), bool(row.get("is_special"))


def _sequence_row(row: dict[str, Any]) -> tuple[Any, ...]:
    ids = np.asarray(row.get("input_ids") or [], np.int32)
    return row["sequence"], row.get("split"), row.get("first_document"), zlib.compress(ids.tobytes(), LEVEL)


def below(error: DataError, suite: Path) -> str:
    """The error for a page: without the suite's own place on this machine, which an export would publish."""
    return str(error).replace(f"{suite}/", "")


def build_sae(path: Path, suite: Path, record: SaeRecord, tables: Tried, advance: Advance) -> None:
    """Write an SAE's database into the new file `path`."""
    with _database(path, SAE_TABLES, SAE_INDEXES) as database:
        _SaeWriter(database, suite, record, tables).write(advance)


class _SaeWriter:
    """Fills one SAE's database."""

    def __init__(self, database: sqlite3.Connection, suite: Path, record: SaeRecord, tables: Tried) -> None:
        self._database, self._suite, self._record, self._tables = database, suite, record, tables
        self._postings, self._matches = Postings(), Matches()
        self._shuffled = np.empty(0, np.int64)

    def write(self, advance: Advance) -> None:
        latents, explanations = sae_files(self._suite, self._record)
        facts: dict[str, Any] = {"facts": {}, "is_described": False, "problem": None}
        labels: dict[int, tuple[Any, ...]] = {}
        written = 0
        try:
            labels = self._read_labels(explanations)
            self._tables.require(latents)
            file = open_latents(latents, self._record.width)
            # A walk through all latents in an order that looks random and never changes; now that there are so many.
            self._shuffled = np.random.default_rng(self._record.width).permutation(self._record.width)
            facts |= {"facts": _object(file.facts), "is_described": "examples" in file.schema.names}
            for batch in file.batches(["latent", *SCALARS, *LISTS]):
                if batch.column("latent").to_pylist() != list(range(written, written + batch.num_rows)):
                    raise DamagedData(f"{file.path}: rows are not one per latent, in order; describe and publish again")
                self._write_batch(batch, labels)
                written += batch.num_rows
                advance(batch.num_rows)
        except DataError as error:
            facts["problem"] = below(error, self._suite)
            say(f"  {error}")
            advance(self._record.width - written)
        postings = ((token, *arrays) for token, arrays in self._postings.packed())
        self._database.executemany("INSERT INTO postings VALUES (?, ?, ?, ?)", postings)
        self._matches.write(self._database)
        (facts["num_alive"],) = self._database.execute("SELECT count(*) FROM latents WHERE firings > 0").fetchone()
        facts["num_labels"] = sum(kind not in UNLABELLED for _, _, kind, *_ in labels.values())
        self._database.execute("INSERT INTO facts VALUES ('contents', ?)", (json.dumps(facts),))

    def _read_labels(self, path: Path) -> dict[int, tuple[Any, ...]]:
        """By latent its label of best detection score, or its tokens where it has none: label, method, kind and scores."""
        if not path.is_file():
            return {}
        self._tables.require(path)
        table = read_columns(path, EXPLANATIONS)
        names = ("latent", "label", "method", "kind", "detection", "fuzzing", "detection_null")
        none = [None] * len(table)
        columns = [table[name].to_pylist() if name in table.schema.names else none for name in names]
        best: dict[int, tuple[Any, ...]] = {}
        for latent, label, method, kind, *scores in zip(*columns, strict=True):
            if not label or latent is None or not 0 <= latent < self._record.width:
                continue
            detection, fuzzing, null = map(_finite, scores)
            quality = None if detection is None or null is None or kind in UNLABELLED else detection - null
            row = (label, method, kind, detection, fuzzing, quality)
            if latent not in best or _rank(row) < _rank(best[latent]):
                best[latent] = row
        return best

    def _write_batch(self, batch: pyarrow.RecordBatch, labels: dict[int, tuple[Any, ...]]) -> None:
        latents = batch.column("latent").to_pylist()
        names = set(batch.schema.names)
        none = [None] * batch.num_rows
        scalars = [[_finite(value) for value in batch.column(name).to_pylist()] if name in names else none for name in SCALARS]
        top, nearest = self._lists(batch, names)
        texts = zip(*(labels.get(latent, (None,) * 6) for latent in latents), strict=True)
        rows: Iterable[tuple[Any, ...]] = zip(
            latents, self._shuffled[latents].tolist(), *scalars, nearest, top, *_strongest(batch, names), *texts, strict=True
        )
        self._database.executemany(f"INSERT INTO latents VALUES ({', '.join('?' * 18)})", rows)

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
            self._matches.add(latents[rows], fields)
        return top, [None if math.isnan(value) else value for value in nearest.tolist()]


def _strongest(batch: pyarrow.RecordBatch, names: set[str]) -> tuple[list[int | None], list[int | None]]:
    """For each row the sequence and position of its first example, which is the strongest."""
    none: list[int | None] = [None] * batch.num_rows
    if "examples" not in names:
        return none, none
    rows, fields = flat(batch, "examples")
    kept, first = np.unique(rows, return_index=True)
    found = []
    for name in ("sequence", "position"):
        column = list(none)
        for row, value in zip(kept.tolist(), fields[name][first].tolist(), strict=True):
            column[row] = value
        found.append(column)
    return found[0], found[1]


def _rank(row: tuple[Any, ...]) -> tuple[bool, float]:
    """Labels before mere tokens, then by detection."""
    return row[2] in UNLABELLED, -(row[3] or 0.0)


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; an empty one where it is something else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> Any:
    """`value`, or None where it is NaN or infinite: no such number is sorted or shown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
