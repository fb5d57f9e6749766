"""What pages ask of a suite: suite.json at once, sorted and searched columns of its index part by part, whole rows of its tables.

Everything is read-only, and a database is never written again once it is there, so that threads and processes share it.
"""

import json
import sqlite3
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.files import read_sealed
from everyscope.base.ids import content_id
from everyscope.browse.build import below
from everyscope.browse.latent_rows import Rows
from everyscope.browse.parts import PATIENCE, TEXT, Parts
from everyscope.browse.pieces import Piece, unknown_piece
from everyscope.browse.slices import read_slices, read_splits, slice_names
from everyscope.sites.names import SITE_TITLES, Site
from everyscope.suite.latents import UNLABELLED
from everyscope.suite.layout import EXPLANATIONS_FILE, LATENTS_FILE, METRICS_FILE, width_label
from everyscope.suite.records import SuiteIndex

DAMAGED_INDEX = (sqlite3.DatabaseError, zlib.error, KeyError, json.JSONDecodeError)
"""What shows that the file of an index was changed after it was written."""
MAX_VARIABLES = 500
"""Values in one SQL question; SQLite's own limit is higher."""
MAX_OPEN = 400
"""Databases that are kept open; many systems allow a process 1,024 files."""
MODEL_FILE = "text/model.json"


@dataclass(frozen=True)
class Contents:
    """What only an SAE's tables tell."""

    facts: dict[str, Any]
    """What its latents.parquet says of itself; empty where it was not described."""
    is_described: bool
    """Whether it has examples."""
    num_alive: int
    """Latents that fire [latents]."""
    num_labels: int
    """Latents that have a label: a rule, or words of a language model; tokens alone are none [latents]."""
    problem: str | None
    """Why its latents cannot be shown, if they cannot."""


@dataclass(eq=False)
class SaeFacts:
    """One SAE of the suite."""

    number: int
    """Its place in suite.json."""
    folder: str
    """Its folder below the suite, which is its name in addresses."""
    first: int
    """The number of its latent 0 among all of the suite."""
    record: dict[str, Any]
    """Its entry in suite.json."""
    contents: Contents
    """What its tables tell; as long as they are not indexed, what suite.json lets expect."""
    is_indexed: bool = False
    """Whether its tables were indexed."""

    @property
    def is_described(self) -> bool:
        """See Contents."""
        return self.contents.is_described

    @property
    def num_alive(self) -> int:
        """See Contents."""
        return self.contents.num_alive

    @property
    def num_labels(self) -> int:
        """See Contents."""
        return self.contents.num_labels

    @property
    def problem(self) -> str | None:
        """See Contents."""
        return self.contents.problem

    @property
    def site(self) -> Site:
        """Where it sits."""
        return Site(self.record["site"], self.record["layer"])

    @property
    def width(self) -> int:
        """Number of latents [latents]."""
        return self.record["width"]

    @property
    def headline(self) -> dict[str, Any]:
        """Its headline numbers, as in suite.json."""
        return self.record["metrics"]

    @property
    def is_canonical(self) -> bool:
        """Whether it is the one to take at its site and width."""
        return bool(self.headline.get("is_canonical") or self.record.get("is_canonical"))

    @property
    def place(self) -> str:
        """Its site in words."""
        return SITE_TITLES[self.site.kind] + ("" if self.site.kind == "embed" else f", layer {self.site.layer}")

    @property
    def size(self) -> str:
        """Its width and L0 in words."""
        return f"width {width_label(self.width)}, L0 {self.headline['l0']:.3g}"

    @property
    def title(self) -> str:
        """Which SAE it is, in words."""
        return f"{self.place}, {self.size}"


def packed(blob: bytes | None, dtype: type) -> np.ndarray:
    """An array that was stored as its bytes."""
    return np.frombuffer(blob or b"", dtype)


class Database:
    """An open database, which threads take turns to ask."""

    def __init__(self, path: Path) -> None:
        """Open the finished database at `path`, which nobody changes any more."""
        # immutable: no reader needs a lock in the file system, not even on a read-only disk
        address = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(address, uri=True, check_same_thread=False)
        self._connection.execute("PRAGMA cache_size=-1024")
        self._lock = threading.Lock()

    def rows(self, question: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that answer an SQL question."""
        with self._lock:
            return self._connection.execute(question, tuple(values)).fetchall()


class Index:
    """A suite, and as much of its index as there is."""

    def __init__(self, suite: Path, record: SuiteIndex, parts: Parts) -> None:
        """Reads nothing: all of suite.json is in `record`, and the rest is read when it is first asked for."""
        self._folder, self._parts = suite, parts
        self._databases: OrderedDict[int, Database] = OrderedDict()
        self._lock = threading.Lock()
        self._rows = Rows()
        self._pieces: dict[int, Piece] = {}
        self._scales: dict[int, np.ndarray] = {}
        self.suite: dict[str, Any] = record.model_copy(update={"saes": (), "files": {}}).as_json()
        self.key = content_id([self.suite["title"], self.suite["model"]])[:16]
        """What a reader's own things are kept under: the same when the suite is published again, or exported."""
        self.text_problem: str | None = None
        has_text = any(name.startswith("text/") for name in record.files) or (suite / "text").is_dir()
        self.saes: list[SaeFacts] = []
        first = 0
        for number, sae in enumerate(record.saes):
            expected = Contents({}, has_text, round(sae.width * (1 - sae.metrics.dead_fraction)), 0, None)
            self.saes.append(SaeFacts(number, sae.folder, first, sae.as_json(), expected))
            first += sae.width
        self._expected = {sae.number: sae.contents for sae in self.saes}
        self._by_folder = {sae.folder: sae for sae in self.saes}

    def adopt(self, number: int, path: Path) -> None:
        """Take in the database of a part that is ready; any of DAMAGED_INDEX where it is no such database."""
        database = Database(path)
        facts = dict(database.rows("SELECT name, value FROM facts"))
        self._keep(number, database)
        if number == TEXT:
            self.text_problem = facts.get("problem")
        else:
            self.saes[number].contents = Contents(**json.loads(facts["contents"]))
            self.saes[number].is_indexed = True

    def forget(self) -> None:
        """Let go of every part."""
        with self._lock:
            self._databases.clear()
        for sae in self.saes:
            sae.contents, sae.is_indexed = self._expected[sae.number], False

    def rows(self, number: int, question: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows by which a part's database answers an SQL question; Preparing where it is not there yet."""
        path = self._parts.require(number)
        with self._lock:
            database = self._databases.get(number)
            if database is not None:
                self._databases.move_to_end(number)
        return (database or self._keep(number, Database(path))).rows(question, values)

    def _keep(self, number: int, database: Database) -> Database:
        """Keep the database of a part open, as the last used of MAX_OPEN; one that was opened meanwhile stays in its place."""
        with self._lock:
            database = self._databases.setdefault(number, database)
            self._databases.move_to_end(number)
            while len(self._databases) > MAX_OPEN:
                self._databases.popitem(last=False)
        return database

    def require(self, sae: SaeFacts, seconds: float = PATIENCE) -> None:
        """Wait for an SAE's part and for the text's; Preparing where that takes longer."""
        for number in (TEXT, sae.number):
            self._parts.require(number, seconds)

    @property
    def num_indexed(self) -> int:
        """SAEs whose tables were indexed [SAEs]."""
        return sum(sae.is_indexed for sae in self.saes)

    @property
    def is_whole(self) -> bool:
        """Whether every SAE was indexed."""
        return self.num_indexed == len(self.saes)

    @property
    def is_described(self) -> bool:
        """Whether any SAE has examples."""
        return any(sae.is_described for sae in self.saes)

    @cached_property
    def model(self) -> dict[str, Any]:
        """What is known of the language model; nothing where the suite was not described."""
        try:
            return read_sealed(self._folder / MODEL_FILE) if (self._folder / MODEL_FILE).is_file() else {}
        except DataError:
            return {}

    @cached_property
    def has_slices(self) -> bool:
        """Whether anything was compared over the whole suite."""
        return bool(slice_names(self._folder))

    @cached_property
    def slices(self) -> dict[str, Any]:
        """What was compared over the whole suite, by name."""
        return dict(read_slices(self._folder))

    def find(self, folder: str) -> SaeFacts | None:
        """The SAE of that name, which may be any text typed by anyone."""
        return self._by_folder.get(folder)

    def metrics(self, sae: SaeFacts) -> dict[str, Any]:
        """Its metrics.json; the headline numbers where that cannot be read."""
        try:
            return {**sae.headline, **read_sealed(self._folder / sae.folder / METRICS_FILE)}
        except DataError:
            return dict(sae.headline)

    def details(self, sae: SaeFacts, latent: int, columns: Sequence[str] | None = None) -> dict[str, Any] | None:
        """A latent's row of latents.parquet, all of it or those `columns` that it has; None for what is not finite.

        None altogether where there is no such latent. DamagedData where the file was changed since it was indexed.
        """
        self._parts.require(sae.number)
        if not 0 <= latent < sae.width or sae.problem is not None:
            return None
        try:
            return finite(self._rows.latent(self._folder / sae.folder / LATENTS_FILE, sae.width, latent, columns))
        except DataError as error:
            raise DamagedData(below(error, self._folder)) from error

    def explanations(self, sae: SaeFacts, latent: int) -> list[dict[str, Any]]:
        """Its labels with their scores, best first."""
        self._parts.require(sae.number)
        if sae.problem is not None:
            return []
        found: list[dict[str, Any]] = finite(self._rows.labels(self._folder / sae.folder / EXPLANATIONS_FILE, latent))
        return sorted(found, key=lambda row: (row.get("kind") in UNLABELLED, -(row.get("detection") or 0.0)))

    def captions(self, places: Iterable[tuple[SaeFacts, int]]) -> dict[tuple[int, int], dict[str, Any]]:
        """What to call latents, by the SAE's number and the latent: `label`, or None where it has none, `quality`, which is
        detection minus that of other latents' labels, and `top`, the tokens it fires most on.

        Latents of SAEs that are not indexed yet are left out: they will have captions when they are.
        """
        wanted: dict[int, set[int]] = {}
        for sae, latent in places:
            if sae.is_indexed:
                wanted.setdefault(sae.number, set()).add(latent)
            else:
                self._parts.wish(sae.number)
        question = "SELECT latent, label, kind, quality, top_tokens FROM latents WHERE latent IN"
        found = [(number, *row) for number, latents in wanted.items() for row in self._by_ids(number, question, list(latents))]
        tokens = [packed(top, np.int32).tolist() for *_, top in found]
        pieces = self.pieces(token for top in tokens for token in top)
        return {
            (number, latent): {
                "label": None if kind in UNLABELLED else label,
                "quality": quality,
                "top": [pieces[token] for token in top],
            }
            for (number, latent, label, kind, quality, _), top in zip(found, tokens, strict=True)
        }

    def pieces(self, tokens: Iterable[int]) -> dict[int, Piece]:
        """The tokens by id; those that the vocabulary lacks too, as what they are."""
        wanted = set(tokens)
        missing = [token for token in wanted if token not in self._pieces]
        question = "SELECT token, piece, text, is_special FROM vocabulary WHERE token IN"
        for token, raw, text, is_special in self._by_ids(TEXT, question, missing):
            self._pieces[token] = Piece(token, (text or "").encode() if is_special or not raw else raw, bool(is_special))
        return {token: self._pieces.get(token) or unknown_piece(token) for token in wanted}

    def _by_ids(self, number: int, question: str, ids: list[int]) -> list[tuple[Any, ...]]:
        found = []
        for start in range(0, len(ids), MAX_VARIABLES):
            part = ids[start : start + MAX_VARIABLES]
            found += self.rows(number, f"{question} ({', '.join('?' * len(part))})", part)
        return found

    def sequences(self, numbers: Iterable[int]) -> dict[int, tuple[str | None, str | None, np.ndarray]]:
        """Split, first document and tokens of the blocks with these numbers; those that are not stored are left out."""
        question = "SELECT sequence, split, document, ids FROM sequences WHERE sequence IN"
        found = self._by_ids(TEXT, question, sorted(set(numbers)))
        return {number: (split, document, packed(zlib.decompress(ids), np.int32)) for number, split, document, ids in found}

    def beside(self, sae: SaeFacts, latent: int) -> tuple[int | None, int | None, int | None]:
        """The latents that fire before and after `latent`, and the one that follows it in the shuffled walk."""
        alive = "SELECT latent FROM latents WHERE firings > 0 AND"
        before = self.rows(sae.number, f"{alive} latent < ? ORDER BY latent DESC LIMIT 1", (latent,))
        after = self.rows(sae.number, f"{alive} latent > ? ORDER BY latent LIMIT 1", (latent,))
        place = self.rows(sae.number, "SELECT shuffled FROM latents WHERE latent = ?", (latent,))
        walk = f"{alive} shuffled > ? ORDER BY shuffled LIMIT 1"
        shuffled = self.rows(sae.number, walk, (place[0][0] if place else -1,)) or self.rows(sae.number, walk, (-1,))
        first, second, third = (found[0][0] if found else None for found in (before, after, shuffled))
        return first, second, third

    def living(self, sae: SaeFacts, latents: Iterable[int]) -> set[int]:
        """Those of an SAE's latents that fire."""
        question = "SELECT latent FROM latents WHERE firings > 0 AND latent IN"
        return {latent for (latent,) in self._by_ids(sae.number, question, list(latents))}

    def frequencies(self, sae: SaeFacts) -> np.ndarray:
        """How often each latent fires [1]; nothing where no one has counted."""
        found = self.rows(sae.number, "SELECT frequency FROM latents")
        return np.array([value for (value,) in found if value is not None], np.float64)

    def scales(self, sae: SaeFacts) -> tuple[np.ndarray, np.ndarray]:
        """Each latent's highest activation [raw units] and how often it fires [1], float32 [d_sae]; 0 where it is unknown."""
        if sae.number not in self._scales:
            scales = np.zeros((2, sae.width), np.float32)
            question = "SELECT latent, max_activation, frequency FROM latents"
            for latent, highest, frequency in self.rows(sae.number, question):
                scales[:, latent] = highest or 0.0, frequency or 0.0
            self._scales[sae.number] = scales
        highest, frequency = self._scales[sae.number]
        return highest, frequency

    def matches(self, sae: SaeFacts, other: SaeFacts) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """For latents of `sae` their nearest in `other`, and the cosines, highest first; None where no one has compared them."""
        found = self.rows(sae.number, "SELECT latents, others, cosines FROM matches WHERE other = ?", (other.number,))
        if not found:
            return None
        latents, others, cosines = found[0]
        return packed(latents, np.int32), packed(others, np.int32), packed(cosines, np.float32)

    def matched_pairs(self) -> list[tuple[int, int]]:
        """The pairs of SAEs that `matches` knows, of those whose first is indexed."""
        question = "SELECT other FROM matches ORDER BY other"
        return [(sae.number, other) for sae in self.saes if sae.is_indexed for (other,) in self.rows(sae.number, question)]

    def split(self, narrow: SaeFacts, wide: SaeFacts) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What feature splitting was found between two widths: shares, and pairs of latents; None where it was not measured."""
        found = read_splits(self._folder, self.slices, narrow.folder, wide.folder)
        return found and (found[0], finite(found[1]))


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, however deep it lies; numbers become Python's own."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
