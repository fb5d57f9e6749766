"""What words have in common by the company they keep: classes of use, of meaning, and topics, found in the training text itself.

A word's vector is made of the words beside it: positive pointwise mutual information with the commonest words, reduced by its
principal directions. Adjacent words show how a word is used, words some places off what a text is about. Groups
are by k-means on the sphere. All is decided by training text and seed; held-out text is looked up. A group is named by its
commonest words (of use, of meaning) or by the words nearest its centre (topics).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from everyscope.describe.explanations.units import NOWHERE, Units

MIN_COUNT = 5
"""Occurrences below which a word's company is not counted [units]."""
CONTEXTS, DIMENSIONS = 600, 64
"""Commonest units that company is counted with, and principal directions kept."""
NEAR, FAR = 1, 8
"""Reach of the company that tells use, and of that which tells meaning [units]."""
USES, MEANINGS, TOPICS, SUBJECTS = 64, 400, 128, 48
"""Groups by use, by meaning, of passages and of documents, at most."""
PASSAGE = 24
"""Units before and with a unit that make its passage [units]."""
PASSAGES_FOR_MEANS = 20_000
"""Passages from which their groups are found, at most."""
ROUNDS = 12
"""Of k-means."""
NAMED = 3
"""Words by which a group is named [words]."""


@dataclass(frozen=True)
class Groups:
    """A grouping of units or of stretches of text."""

    of: Int[np.ndarray, " things"]
    """Group of each thing; the last group is that of what is too rare to be grouped."""
    names: tuple[tuple[str, ...], ...]
    """For each group the words that stand for it; none for the last."""


@dataclass(frozen=True)
class Company:
    """All that is learnt from the training text."""

    use: Groups
    """Of kinds of unit."""
    meaning: Groups
    """Of kinds of unit."""
    far: Float[np.ndarray, "kinds dims"]
    """Vector of each kind, by its company some places off, weighed by how rare the kind is; 0 where it has none."""
    topic_centres: Float[np.ndarray, "groups dims"]
    topic_names: tuple[tuple[str, ...], ...]
    subject_centres: Float[np.ndarray, "groups dims"]
    subject_names: tuple[tuple[str, ...], ...]
    kinds: dict[str, int]
    """Number of each kind by its text."""

    def looked_up(self, units: Units) -> Int[np.ndarray, " kinds"]:
        """For the kinds of other text, ours, NOWHERE where there is none."""
        return np.array([self.kinds.get(text, NOWHERE) for text in units.texts], np.int64)


def company_of(units: Units, seed: int) -> Company:
    """Learn all groups from training text."""
    counts = np.bincount(units.sequence, minlength=len(units.texts))
    words = np.flatnonzero(counts >= MIN_COUNT)
    random = np.random.default_rng(seed)
    near, far = (_vectors(units, counts, words, reach) for reach in (NEAR, FAR))
    use = _grouped(units, counts, words, near, USES, random)
    meaning = _grouped(units, counts, words, _unit(np.concatenate([near, far], axis=1)), MEANINGS, random)
    weighed = np.zeros((len(units.texts), far.shape[1]))
    weighed[words] = far * np.log(len(units.sequence) / counts[words])[:, None] if len(words) else 0
    places = np.sort(random.permutation(len(units.sequence))[:PASSAGES_FOR_MEANS])
    sample = passage_vectors(units, np.arange(len(units.texts)), weighed, places)
    topics = k_means(sample, TOPICS, random)
    subjects = k_means(document_vectors(units, np.arange(len(units.texts)), weighed), SUBJECTS, random)
    readable = np.array([word for word in words.tolist() if units.texts[word].isalpha()], np.int64)
    named = [_nearest(units, weighed, readable, centres) for centres in (topics, subjects)]
    kinds = {text: number for number, text in enumerate(units.texts)}
    return Company(use, meaning, weighed, topics, named[0], subjects, named[1], kinds)


def _vectors(units: Units, counts: np.ndarray, words: np.ndarray, reach: int) -> Float[np.ndarray, "words dims"]:
    """Unit vectors of words from their company within `reach`; sides count apart where it is 1."""
    contexts = np.argsort(-counts, kind="stable")[:CONTEXTS]
    column, row = (np.full(len(counts), NOWHERE) for _ in range(2))
    column[contexts], row[words] = np.arange(len(contexts)), np.arange(len(words))
    sides = 2 if reach == 1 else 1
    table = np.zeros(len(words) * len(contexts) * sides)
    for offset in range(1, reach + 1):
        left, right = units.sequence[:-offset], units.sequence[offset:]
        is_near = units.stretch[:-offset] == units.stretch[offset:]
        for side, (word, beside) in enumerate(((left, right), (right, left))):
            kept = is_near & (row[word] >= 0) & (column[beside] >= 0)
            at = (row[word[kept]] * len(contexts) + column[beside[kept]]) * sides + (side if sides == 2 else 0)
            table += np.bincount(at, minlength=len(table))
    table = table.reshape(len(words), len(contexts) * sides)
    total = max(table.sum(), 1.0)
    expected = table.sum(1, keepdims=True) * (table.sum(0, keepdims=True) ** 0.75)
    expected *= total / max(float((table.sum(0) ** 0.75).sum()), 1.0) / total
    information = np.log(np.maximum(table, 1e-12) / np.maximum(expected, 1e-12))
    positive = np.sqrt(np.maximum(information, 0.0) * (table > 0))
    values, directions = np.linalg.eigh(positive.T @ positive)
    kept = directions[:, np.argsort(-values, kind="stable")[:DIMENSIONS]]
    return _unit(positive @ kept)


def _unit(rows: Float[np.ndarray, "n dims"]) -> Float[np.ndarray, "n dims"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def k_means(rows: Float[np.ndarray, "n dims"], count: int, random: np.random.Generator) -> Float[np.ndarray, "groups dims"]:
    """Centres, on the unit sphere, of at most `count` groups of unit rows; each group has a row at the least."""
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    if not len(rows):
        return rows
    centres = rows[np.sort(random.choice(len(rows), min(count, len(rows)), replace=False))]
    for _ in range(ROUNDS):
        group = nearest_of(rows, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, group, rows)
        kept = np.unique(group)
        centres = _unit(sums[kept])
    return centres


def nearest_of(rows: Float[np.ndarray, "n dims"], centres: Float[np.ndarray, "groups dims"]) -> Int[np.ndarray, " n"]:
    """The centre nearest each row by cosine; the number of centres where a row is 0, for it is near none."""
    if not len(centres):
        return np.zeros(len(rows), np.int64)
    found = np.concatenate([(rows[at : at + 4096] @ centres.T).argmax(1) for at in range(0, max(len(rows), 1), 4096)])
    return np.where(np.linalg.norm(rows, axis=1) > 0, found, len(centres))


def _grouped(
    units: Units, counts: np.ndarray, words: np.ndarray, vectors: np.ndarray, count: int, random: np.random.Generator
) -> Groups:
    """Kinds of unit by their vectors; a group is named by its commonest members."""
    centres = k_means(vectors, count, random)
    of = np.full(len(units.texts), len(centres))
    of[words] = nearest_of(vectors, centres)
    names = []
    for group in range(len(centres)):
        members = np.flatnonzero(of == group)
        names.append(tuple(units.texts[word] for word in members[np.argsort(-counts[members], kind="stable")][:NAMED]))
    return Groups(of, (*names, ()))


def _nearest(units: Units, vectors: np.ndarray, words: np.ndarray, centres: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """For each centre the words nearest it; nothing for what is near none."""
    if not len(words):
        return ((),) * (len(centres) + 1)
    near = np.argsort(-(_unit(vectors[words]) @ centres.T), axis=0, kind="stable")[:NAMED].T
    return (*(tuple(units.texts[word] for word in words[row]) for row in near), ())


def passage_vectors(
    units: Units, kind: Int[np.ndarray, " kinds"], vectors: Float[np.ndarray, "kinds dims"], places: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n dims"]:
    """For some units the direction of the sum over each and those before it, PASSAGE in all, of its stretch.

    `kind` numbers the units' kinds as the vectors are, NOWHERE where there is none.
    """
    known = np.concatenate([vectors, np.zeros((1, vectors.shape[1]))])  # the last, for NOWHERE
    numbers, found = kind[units.sequence], np.zeros((len(places), vectors.shape[1]))
    for back in range(PASSAGE):
        before = places - back
        is_same = (before >= 0) & (units.stretch[before] == units.stretch[places])
        found += known[np.where(is_same, numbers[before], NOWHERE)]
    return _unit(found)


def document_vectors(
    units: Units, kind: Int[np.ndarray, " kinds"], vectors: Float[np.ndarray, "kinds dims"]
) -> Float[np.ndarray, "documents dims"]:
    """The same for each document, over all of its units."""
    sums = np.zeros((int(units.document.max(initial=-1)) + 1, vectors.shape[1]))
    known = kind[units.sequence] >= 0
    np.add.at(sums, units.document[known], vectors[kind[units.sequence[known]]])
    return _unit(sums)
