"""What pages ask of an index. Read-only, one connection a thread, so that any number of requests and processes share a file."""

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from everyscope.browse.pieces import Piece, unknown_piece
from everyscope.browse.slices import split_rows
from everyscope.sites.names import Site, SiteKind
from everyscope.suite.layout import width_label

SITE_TITLES: dict[SiteKind, str] = {
    "attn_out": "Attention output",
    "mlp_out": "MLP output",
    "resid_post": "Residual stream",
    "embed": "Embedding",
    "mlp_in": "MLP input",
    "resid_mid": "Residual stream before the MLP",
    "transcoder": "Transcoder",
}
DAMAGED_INDEX = (sqlite3.DatabaseError, zlib.error, KeyError, json.JSONDecodeError)
"""What shows that the file of an index was changed after it was written."""
MAX_VARIABLES = 500
"""Values in one SQL question; SQLite's own limit is higher."""


@dataclass(frozen=True)
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


class Index:
    """An open index."""

    def __init__(self, path: Path) -> None:
        """Open the finished index at `path`, which nobody changes any more."""
        self._path = path
        self._local = threading.local()
        self._pieces: dict[int, Piece] = {}
        suite = dict(self.rows("SELECT name, value FROM suite"))
        self.suite: dict[str, Any] = json.loads(suite["index"])
        self.model: dict[str, Any] = json.loads(suite.get("model", "{}"))
        self.text_problem: str | None = suite.get("text_problem")
        columns = "id, folder, first, record, facts, is_described, num_alive, num_labels, problem"
        self.saes = [
            SaeFacts(
                number, folder, first, json.loads(record), _object(facts), bool(is_described), num_alive, num_labels, problem
            )
            for number, folder, first, record, facts, is_described, num_alive, num_labels, problem in self.rows(
                f"SELECT {columns} FROM saes ORDER BY id"
            )
        ]
        self._by_folder = {sae.folder: sae for sae in self.saes}
        schemas = self.rows("SELECT id, arrow_schema FROM saes WHERE length(arrow_schema) > 0")
        self._schemas = {number: pyarrow.ipc.read_schema(pyarrow.py_buffer(schema)) for number, schema in schemas}
        self.slices: dict[str, Any] = {
            name: json.loads(value) for name, value in self.rows("SELECT name, value FROM slices ORDER BY name")
        }

    def rows(self, question: str, values: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that answer an SQL question."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            # immutable: a finished index is never written again, so no reader needs a lock, not even on a read-only disk
            connection = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
        return connection.execute(question, tuple(values)).fetchall()

    @property
    def is_described(self) -> bool:
        """Whether any SAE has examples."""
        return any(sae.is_described for sae in self.saes)

    def find(self, folder: str) -> SaeFacts | None:
        """The SAE of that name, which may be anything that a stranger typed."""
        return self._by_folder.get(folder)

    def metrics(self, sae: SaeFacts) -> dict[str, Any]:
        """Its metrics.json; the headline numbers where that could not be read."""
        ((blob,),) = self.rows("SELECT metrics FROM saes WHERE id = ?", (sae.number,))
        found = json.loads(zlib.decompress(blob)) if blob else {}
        return {**sae.headline, **(found if isinstance(found, dict) else {})}

    def details(self, sae: SaeFacts, latent: int, columns: Sequence[str] | None = None) -> dict[str, Any] | None:
        """A latent's row of latents.parquet, all of it or those `columns` that it has; None for what is not finite.

        None altogether where there is no such latent.
        """
        if not 0 <= latent < sae.width or sae.number not in self._schemas:
            return None
        found = self.rows("SELECT row FROM details WHERE id = ?", (sae.first + latent,))
        if not found:
            return None
        batch = pyarrow.ipc.read_record_batch(pyarrow.py_buffer(zlib.decompress(found[0][0])), self._schemas[sae.number])
        known = batch.schema.names
        chosen = known if columns is None else [name for name in columns if name in known]
        return finite(batch.select(chosen).to_pylist()[0]) if chosen else {}

    def explanations(self, sae: SaeFacts, latent: int) -> list[dict[str, Any]]:
        """Its labels with their scores, best first."""
        found = self.rows("SELECT rows FROM explanations WHERE id = ?", (sae.first + latent,))
        return json.loads(found[0][0]) if found else []

    def captions(self, places: Iterable[tuple[SaeFacts, int]]) -> dict[tuple[int, int], dict[str, Any]]:
        """What to call latents, by the SAE's number and the latent: `label`, or None, and `top`, the tokens it fires most on."""
        wanted = {sae.first + latent: (sae.number, latent) for sae, latent in places}
        found = self._by_ids("SELECT id, label, top_tokens FROM latents WHERE id IN", list(wanted))
        tokens = {number: packed(top, np.int32).tolist() for number, _, top in found}
        pieces = self.pieces(token for top in tokens.values() for token in top)
        return {
            wanted[number]: {"label": label, "top": [pieces[token] for token in tokens[number]]} for number, label, _ in found
        }

    def pieces(self, tokens: Iterable[int]) -> dict[int, Piece]:
        """The tokens by id; those that the vocabulary lacks too, as what they are."""
        wanted = set(tokens)
        missing = [token for token in wanted if token not in self._pieces]
        question = "SELECT token, piece, text, is_special FROM vocabulary WHERE token IN"
        for token, raw, text, is_special in self._by_ids(question, missing):
            self._pieces[token] = Piece(token, (text or "").encode() if is_special or not raw else raw, bool(is_special))
        return {token: self._pieces.get(token) or unknown_piece(token) for token in wanted}

    def _by_ids(self, question: str, ids: list[int]) -> list[tuple[Any, ...]]:
        found = []
        for start in range(0, len(ids), MAX_VARIABLES):
            part = ids[start : start + MAX_VARIABLES]
            found += self.rows(f"{question} ({', '.join('?' * len(part))})", part)
        return found

    def sequences(self, numbers: Iterable[int]) -> dict[int, tuple[str | None, str | None, np.ndarray]]:
        """Split, first document and tokens of the blocks with these numbers; those that are not stored are left out."""
        found = self._by_ids("SELECT sequence, split, document, ids FROM sequences WHERE sequence IN", sorted(set(numbers)))
        return {number: (split, document, packed(zlib.decompress(ids), np.int32)) for number, split, document, ids in found}

    def beside(self, sae: SaeFacts, latent: int) -> tuple[int | None, int | None, int | None]:
        """The latents that fire before and after `latent`, and the one that follows it in the shuffled walk."""
        here = (sae.first, sae.first + sae.width - 1, sae.first + latent)
        alive = "SELECT latent FROM latents WHERE firings > 0 AND id BETWEEN ? AND ? AND id"
        before = self.rows(f"{alive} < ? ORDER BY id DESC LIMIT 1", here)
        after = self.rows(f"{alive} > ? ORDER BY id LIMIT 1", here)
        place = self.rows("SELECT shuffled FROM latents WHERE id = ?", (sae.first + latent,))
        walk = "SELECT latent FROM latents WHERE sae = ? AND firings > 0 AND shuffled > ? ORDER BY shuffled LIMIT 1"
        shuffled = self.rows(walk, (sae.number, place[0][0] if place else -1)) or self.rows(walk, (sae.number, -1))
        first, second, third = (found[0][0] if found else None for found in (before, after, shuffled))
        return first, second, third

    def frequencies(self, sae: SaeFacts) -> np.ndarray:
        """How often each latent fires [1]; nothing where no one has counted."""
        found = self.rows("SELECT frequency FROM latents WHERE sae = ?", (sae.number,))
        return np.array([value for (value,) in found if value is not None], np.float64)

    def matches(self, sae: SaeFacts, other: SaeFacts) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """For latents of `sae` their nearest in `other`, and the cosines, highest first; None where no one has compared them."""
        found = self.rows("SELECT latents, others, cosines FROM matches WHERE sae = ? AND other = ?", (sae.number, other.number))
        if not found:
            return None
        latents, others, cosines = found[0]
        return packed(latents, np.int32), packed(others, np.int32), packed(cosines, np.float32)

    def matched_pairs(self) -> list[tuple[int, int]]:
        """The pairs of SAEs that `matches` knows."""
        return [(sae, other) for sae, other in self.rows("SELECT sae, other FROM matches ORDER BY sae, other")]

    def split(self, narrow: SaeFacts, wide: SaeFacts) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """What feature splitting was found between two widths: shares, and pairs of latents; None where it was not measured."""
        found = self.rows("SELECT summary, rows FROM splits WHERE narrow = ? AND wide = ?", (narrow.number, wide.number))
        return (json.loads(found[0][0]), finite(split_rows(found[0][1]))) if found else None


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite, however deep it lies; numbers become Python's own."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; an empty one where it is something else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
