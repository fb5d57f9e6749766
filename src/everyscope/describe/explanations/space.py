"""Where tokens stand in the model's own embedding, which knows what is alike in use and meaning better than our text does.

Embeddings are whitened over the training documents, so that no common direction outweighs the others.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from everyscope.describe.explanations.passages import Passages

PARTS = ("own", "before", "after", "near")
"""The token itself, its neighbours, and the text before it."""
DIMENSIONS = {"own": 1024, "before": 64, "after": 64, "near": 64}
"""Principal directions of the embedding that each part is seen in, at most; a token itself in all, for what sets one token apart
from those like it lies in the least of them."""
DECAY, RARITY = 0.93, 1.5
"""Of the text before: what each further token counts, and the power of its rarity by which it is weighed [1]."""


@dataclass(frozen=True)
class Space:
    """Where every token of some passages stands in the embedding."""

    tokens: Int[np.ndarray, " kinds"]
    """Token id of each row of `vectors` but the last."""
    vectors: Float[np.ndarray, "kinds_plus_1 dims"]
    """Whitened embeddings; the last row is 0, for no token."""
    neighbours: dict[str, Int[np.ndarray, " tokens"]]
    """Row of the token itself, of the one before and of the one after, for each token of the passages."""
    near: Float[np.ndarray, "tokens near_dims"]
    """Decaying sum over the tokens before, each weighed by its rarity."""
    rarity: Float[np.ndarray, " kinds_plus_1"]
    """Those weights [1]."""

    @property
    def slices(self) -> dict[str, slice]:
        """Where each part stands in z."""
        sizes = [min(DIMENSIONS[part], self.vectors.shape[1]) for part in PARTS]
        ends = np.cumsum(sizes).tolist()
        return {part: slice(end - size, end) for part, size, end in zip(PARTS, sizes, ends, strict=True)}

    def z(self, tokens: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dims"]:
        """What is weighed of some tokens, part by part."""
        return np.concatenate(self._parts(tokens), axis=1)

    def mean_z(self, tokens: Int[np.ndarray, " n"]) -> Float[np.ndarray, " dims"]:
        """The mean of z over some tokens."""
        return np.concatenate([part.mean(0) for part in self._parts(tokens)])

    def _parts(self, tokens: np.ndarray) -> list[np.ndarray]:
        beside = [self.vectors[self.neighbours[part][tokens], : DIMENSIONS[part]] for part in PARTS[:-1]]
        return [*beside, self.near[tokens]]


def kinds_of(passages: Passages) -> Int[np.ndarray, " kinds"]:
    """The token ids that occur, whose embeddings `space_of` needs."""
    return np.unique(passages.input_ids[passages.mask]).astype(np.int64)


def space_of(passages: Passages, kinds: Int[np.ndarray, " kinds"], embedding: Float[np.ndarray, "kinds d"]) -> Space:
    """Whitened by the tokens of the training documents; `embedding` has a row for each of `kinds`."""
    flat, counts = passages.input_ids.ravel(), np.zeros(len(kinds))
    is_training = passages.is_training
    row = np.full(int(flat.max(initial=0)) + 1, len(kinds))
    row[kinds] = np.arange(len(kinds))
    counts += np.bincount(row[flat[is_training]], minlength=len(kinds) + 1)[:-1]
    share = counts / max(counts.sum(), 1)
    centred = embedding.astype(np.float64) - share @ embedding
    variance, directions = np.linalg.eigh((centred * share[:, None]).T @ centred)
    kept = np.argsort(-variance)[: max(DIMENSIONS.values())]
    kept = kept[variance[kept] > 1e-6 * max(variance.max(), 1e-30)]
    white = (centred @ (directions[:, kept] / np.sqrt(variance[kept]))).astype(np.float32)
    vectors = np.concatenate([white, np.zeros((1, len(kept)), np.float32)])
    rows = np.where(passages.mask, row[passages.input_ids], len(kinds))
    follows = np.zeros(rows.shape, bool)
    follows[:, 1:] = (passages.document[:, 1:] == passages.document[:, :-1]) & passages.mask[:, 1:] & passages.mask[:, :-1]
    before, after = (np.full(rows.shape, len(kinds)) for _ in range(2))
    before[:, 1:] = np.where(follows[:, 1:], rows[:, :-1], len(kinds))
    after[:, :-1] = np.where(follows[:, 1:], rows[:, 1:], len(kinds))
    rarity = np.append(np.log(max(counts.sum(), 1) / np.maximum(counts, 1)), 0.0)
    rarity = ((rarity / max(rarity.max(), 1e-30)) ** RARITY).astype(np.float32)
    near = _decaying(vectors[:, : DIMENSIONS["near"]] * rarity[:, None], rows, follows)
    near /= max(float(near[is_training].std()), 1e-12)
    return Space(kinds, vectors, {"own": rows.ravel(), "before": before.ravel(), "after": after.ravel()}, near, rarity)


def _decaying(vectors: np.ndarray, rows: np.ndarray, follows: np.ndarray) -> Float[np.ndarray, "tokens dims"]:
    """For each token the sum over those before it in its document and block, each counting DECAY of the next one."""
    found = np.zeros((*rows.shape, vectors.shape[1]), np.float32)
    for place in range(1, rows.shape[1]):
        found[:, place] = (found[:, place - 1] * np.float32(DECAY) + vectors[rows[:, place - 1]]) * follows[:, place, None]
    return found.reshape(-1, vectors.shape[1])
