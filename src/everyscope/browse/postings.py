"""Packed lists of the index: which latents fire most on a token, and which latents of two SAEs point the same way.

Both are sorted once and stored as arrays, a row for each token or pair of SAEs: a million latents make ten million entries.
"""

import sqlite3
from collections.abc import Iterator

import numpy as np

ROOT_RELATION = 0
"""The relation of neighbours in the same SAE (0); the others lie in another."""


class Postings:
    """By token, the latents that fire most on it, those that fire on the largest share of its occurrences first."""

    def __init__(self) -> None:
        """Of one SAE, empty."""
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, latents: np.ndarray, tokens: np.ndarray, shares: np.ndarray, counts: np.ndarray) -> None:
        """Entries of some latents, all [entries]."""
        self._parts.append(
            (tokens.astype(np.int32), latents.astype(np.int32), shares.astype(np.float32), counts.astype(np.int32))
        )

    def packed(self) -> Iterator[tuple[int, tuple[bytes, bytes, bytes]]]:
        """Each token with its latents (int32), their shares (float32) and counts (int32)."""
        if not self._parts:
            return
        tokens, latents, shares, counts = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        order = np.lexsort((latents, -counts, -np.nan_to_num(shares), tokens))
        tokens, latents, shares, counts = tokens[order], latents[order], shares[order], counts[order]
        edges = np.flatnonzero(np.diff(tokens)) + 1
        for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
            if stop > start:
                packed = (latents[start:stop].tobytes(), shares[start:stop].tobytes(), counts[start:stop].tobytes())
                yield int(tokens[start]), packed


class Matches:
    """By other SAE, for each latent of this one its nearest latent there, highest cosine first."""

    def __init__(self) -> None:
        """Of one SAE, empty."""
        self._parts: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def add(self, latents: np.ndarray, fields: dict[str, np.ndarray]) -> None:
        """Neighbours of some latents in other SAEs; `latents` [entries], and the fields of their neighbours."""
        is_elsewhere = (fields["relation"] != ROOT_RELATION) & np.isfinite(fields["cosine"])
        for other in np.unique(fields["sae"][is_elsewhere]).tolist():
            here = is_elsewhere & (fields["sae"] == other)
            part = (latents[here].astype(np.int32), fields["latent"][here].astype(np.int32), fields["cosine"][here])
            self._parts.setdefault(other, []).append(part)

    def write(self, database: sqlite3.Connection) -> None:
        """Insert all pairs."""
        for other, parts in self._parts.items():
            latents, others, cosines = (np.concatenate(part) for part in zip(*parts, strict=True))
            order = np.lexsort((-cosines, latents))
            best = order[np.unique(latents[order], return_index=True)[1]]
            best = best[np.argsort(-cosines[best], kind="stable")]
            row = (other, latents[best].tobytes(), others[best].tobytes(), cosines[best].astype(np.float32).tobytes())
            database.execute("INSERT INTO matches VALUES (?, ?, ?, ?)", row)
