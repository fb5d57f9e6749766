"""Rules of likeness: what a token, its neighbours and the text before it are like, weighed together.

A model's own embedding knows which tokens are alike in use and meaning, far better than any text we could read here. A rule of
likeness is a direction in it: with z the whitened embeddings of the token, of the one before, of the one after, and the decaying
sum of those before it, a token passes where

    sum over parts of direction_part . z_part >= threshold

The direction is Fisher's: the inverse covariance of z over the learning tokens times the difference between the mean of z where
the latent fires and everywhere. Parts that carry little of the separation are left out, and the threshold is that of the best
balanced accuracy over the windows of the learning half. A label names, for each part, the tokens that add most where the latent
fires; like any rule, it is checked on documents that it was not learnt on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from everyscope.describe.explanations.passages import Windows
from everyscope.describe.explanations.space import DECAY, PARTS, Space
from everyscope.describe.explanations.traits import Traits

RIDGE = 0.05
"""Of the covariance, as a share of its mean diagonal [1]."""
LEAST_PART = 0.1
"""Share of the separation that a part must carry to be in the rule [1]."""
MOST_PARTS = 3
"""Parts of a rule at most: a label of more would not be read."""
NAMED, ALONE = {"own": 4, "before": 2, "after": 2, "near": 2}, 6
"""Tokens named for each part at most, and where it is the only one: eight in all can still be read [tokens]."""
REACH = 16
"""Tokens before a firing among which those of `near` are named [tokens]."""
CHUNK = 1 << 14
"""Tokens whose z is held at once [tokens]."""
BATCH = 64
"""Latents fitted at once: their products with the embedding are one [latents]."""


@dataclass(frozen=True, eq=False)
class Likeness:
    """A rule of likeness."""

    parts: tuple[str, ...]
    """Those of PARTS that are weighed, the weightiest first."""
    direction: Float[np.ndarray, " dims"]
    """0 for the other parts."""
    threshold: float
    named: dict[str, tuple[int, ...]]
    """For each part the ids of the tokens that a label names."""

    def holds(self, traits: Traits, tokens: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which of the tokens pass. Reads nothing but text and the embedding."""
        return traits.space.z(tokens) @ self.direction >= self.threshold


@dataclass(frozen=True)
class Fit:
    """A rule of likeness for one latent, and what it says."""

    rule: Likeness
    tables: dict[str, Float[np.ndarray, " kinds_plus_1"]]
    """For each part the product of the direction with each kind of token."""
    near: Float[np.ndarray, " near_dims"]
    """The part of the direction that is for the text before."""


class LikenessSearch:
    """The search over one set of learning tokens; made once for all latents."""

    def __init__(self, space: Space, tokens: Int[np.ndarray, " n"], windows: Windows) -> None:
        """`windows` are cut from the learning tokens."""
        self._space, self._windows, self._peaks = space, windows, Peaks.of(space, windows)
        self._stretch = np.cumsum(space.neighbours["before"] == len(space.tokens))
        size = sum(part.stop - part.start for part in space.slices.values())
        total, square = np.zeros(size), np.zeros((size, size))
        for start in range(0, len(tokens), CHUNK):
            z = space.z(tokens[start : start + CHUNK])
            total += z.sum(0)
            square += z.T @ z
        self._mean = total / max(len(tokens), 1)
        covariance = square / max(len(tokens), 1) - np.outer(self._mean, self._mean)
        self._covariance = covariance + RIDGE * np.eye(size) * max(float(np.trace(covariance)) / size, 1e-12)
        self._counts = np.bincount(space.neighbours["own"][tokens], minlength=len(space.vectors)) / max(len(tokens), 1)
        self._inverses: dict[tuple[str, ...], np.ndarray] = {}

    def fits(self, latents: Sequence[Int[np.ndarray, " n"]]) -> Iterator[Fit | None]:
        """The rule of each latent, given the learning tokens on which it fires, in order; None where it fires nowhere, or in
        every window or in none. Firings count alike: detection asks for weak ones too.
        """
        for start in range(0, len(latents), BATCH):
            yield from self._fits(latents[start : start + BATCH])

    def _fits(self, latents: Sequence[np.ndarray]) -> Iterator[Fit | None]:
        where, space = self._space.slices, self._space
        away = np.stack([self._away(firing) for firing in latents])
        every = away @ self._inverse(PARTS)
        carried = np.stack([(every[:, place] * away[:, place]).sum(1) for place in where.values()], axis=1)
        kept = carried >= LEAST_PART * carried.sum(1, keepdims=True)
        kept[:] &= np.argsort(np.argsort(-carried, axis=1, kind="stable"), axis=1) < MOST_PARTS
        directions = np.zeros(away.shape, np.float32)
        for chosen in np.unique(kept, axis=0):
            rows, parts = (kept == chosen).all(1), tuple(part for part, has in zip(PARTS, chosen, strict=True) if has)
            places = np.concatenate([np.arange(where[part].start, where[part].stop) for part in parts])
            directions[np.ix_(rows, places)] = away[np.ix_(rows, places)] @ self._inverse(parts)
        tables = {part: directions[:, at] @ space.vectors[:, : at.stop - at.start].T for part, at in where.items()}
        for number, firing in enumerate(latents):
            parts = tuple(PARTS[which] for which in np.argsort(-carried[number], kind="stable") if kept[number, which])
            mine = {part: tables[part][number] for part in parts}
            direction = directions[number]
            threshold = self._threshold(self._peaks.largest(mine, direction[where["near"]]), firing)
            rule = None if threshold is None else Likeness(parts, direction, threshold, {})
            yield None if rule is None else Fit(rule, mine, direction[where["near"]])

    def named(self, fit: Fit, firing: Int[np.ndarray, " n"]) -> Likeness:
        """The rule with the tokens that add most to it where the latent fires, beyond what they add everywhere."""
        space, named = self._space, {}
        for part, table in fit.tables.items():
            if part == "near":
                behind = firing[:, None] - np.arange(1, REACH + 1)
                same = (behind >= 0) & (self._stretch[behind] == self._stretch[firing][:, None])
                rows, weights = space.neighbours["own"][behind[same]], (DECAY ** np.arange(REACH) * same)[same]
                weights = weights * space.rarity[rows]
            else:
                rows, weights = space.neighbours[part][firing], np.ones(len(firing))
            seen = np.bincount(rows, weights, minlength=len(space.vectors))[:-1]
            beyond = np.maximum(seen - seen.sum() * self._counts[:-1], 0)
            adds = beyond * table[:-1]
            order = np.argsort(-adds, kind="stable")[: NAMED[part] if len(fit.tables) > 1 else ALONE]
            named[part] = tuple(space.tokens[order[adds[order] > 0]].tolist())
        return replace(fit.rule, named=named)

    def _away(self, firing: np.ndarray) -> Float[np.ndarray, " dims"]:
        """Mean of z where a latent fires, less the mean everywhere; 0 where it fires nowhere."""
        if not len(firing):
            return np.zeros(len(self._mean))
        return self._space.mean_z(firing) - self._mean

    def _inverse(self, parts: tuple[str, ...]) -> np.ndarray:
        """The inverse of the covariance of some parts."""
        if parts not in self._inverses:
            where = self._space.slices
            chosen = np.concatenate([np.arange(where[part].start, where[part].stop) for part in parts])
            self._inverses[parts] = np.linalg.inv(self._covariance[np.ix_(chosen, chosen)])
        return self._inverses[parts]

    def _threshold(self, peaks: Float[np.ndarray, " windows"], firing: np.ndarray) -> float | None:
        """That of the best balanced accuracy over the learning windows; halfway to the next product, for rounding's sake;
        None where nothing is to be told apart.
        """
        window = self._windows.of_token[firing]
        is_active = np.zeros(len(peaks), bool)
        is_active[window[window >= 0]] = True
        num_active = int(is_active.sum())
        if num_active in (0, len(peaks)):
            return None
        order = np.argsort(-peaks, kind="stable")
        hits, falling = np.cumsum(is_active[order]), peaks[order]
        worth = hits / num_active - (np.arange(1, len(peaks) + 1) - hits) / (len(peaks) - num_active)
        parted = np.flatnonzero(falling[:-1] > falling[1:])
        if not len(parted):
            return None
        last = parted[int(worth[parted].argmax())]
        return float((falling[last] + falling[last + 1]) / 2)


@dataclass(frozen=True)
class Peaks:
    """The largest product in each of some windows."""

    kinds: dict[str, Int[np.ndarray, " n"]]
    """Of the tokens of all windows, one window after another, and of their neighbours."""
    near: Float[np.ndarray, "n near_dims"]
    begins: Int[np.ndarray, " windows"]

    @classmethod
    def of(cls, space: Space, windows: Windows) -> "Peaks":
        """All that does not depend on a rule."""
        tokens, begins = windows.stretches(np.arange(len(windows)))
        return cls({part: kinds[tokens] for part, kinds in space.neighbours.items()}, space.near[tokens], begins)

    def largest(self, tables: dict[str, np.ndarray], near: np.ndarray) -> Float[np.ndarray, " windows"]:
        """By the tables of a fit, and its direction for the text before."""
        total = np.zeros(len(self.near), np.float32)
        for part, table in tables.items():
            total += self.near @ near if part == "near" else table[self.kinds[part]]
        return np.maximum.reduceat(total, self.begins) if len(self.begins) else total

    def answers(self, fit: Fit) -> Bool[np.ndarray, " windows"]:
        """Which of the windows pass."""
        return self.largest(fit.tables, fit.near) >= fit.rule.threshold
