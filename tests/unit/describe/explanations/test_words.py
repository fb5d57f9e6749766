"""Words whatever tokens they are cut into, their classes, and groups by company that are planted and found again."""

import numpy as np
import pytest

from everyscope.describe.explanations.company import (
    company_of,
    document_vectors,
    k_means,
    nearest_of,
    passage_vectors,
)
from everyscope.describe.explanations.units import NOWHERE, Units, read_units
from everyscope.describe.explanations.word_classes import CLASSES, ENDING_NAMES, class_of, ending_of

CLASSED = {
    "the": "article",
    "He": "subject pronoun",
    "whose": "possessive",
    "don’t": "form of do",
    "could": "modal verb",
    "1997": "year",
    "12": "number",
    "1,200.5": "number with a comma or point",
    "running": "word in -ing",
    "bring": "other word",
    "station": "word in -tion",
    "quickly": "word in -ly",
    "Monday": "day or month",
    "Paris": "capitalised word inside a sentence",
    "NASA": "word in capitals",
    "?": "question or exclamation mark",
    "(": "opening bracket",
    "$": "sign of money or per cent",
    "\n\n": "line break",
    "★": "other sign",
    "cat": "other short word",
}


def test_words_and_signs_are_classed():
    assert {word: class_of(word, False) for word in CLASSED} == CLASSED
    assert class_of("Paris", True) == "other word that begins a sentence"
    assert set(CLASSED.values()) <= set(CLASSES)
    assert len(set(CLASSES)) == len(CLASSES)
    assert ending_of("horses") == "word in -es"
    assert ending_of("was") == ENDING_NAMES[0]


def units_of(*stretches: list[bytes]) -> Units:
    """Stretches of tokens, each a block and a document of its own."""
    pieces = [*sorted({piece for stretch in stretches for piece in stretch}), b""]
    ctx = max(map(len, stretches))
    ids = np.full((len(stretches), ctx), len(pieces) - 1)
    mask = np.zeros(ids.shape, bool)
    for block, stretch in enumerate(stretches):
        ids[block, : len(stretch)] = [pieces.index(piece) for piece in stretch]
        mask[block, : len(stretch)] = True
    return read_units(ids, np.arange(len(stretches))[:, None].repeat(ctx, 1), mask, pieces)


def test_a_word_is_whole_however_it_is_cut():
    """Tokens of a word share its unit; blanks are in none; halves of a character belong to the word they are in."""
    whole = units_of(
        [b"Don", b"'t", b" re", b"peat", b",", b"  ", b" 1", b"9", b"97", b"\n", b"\n", b" na\xc3", b"\xafve"], [b"x"]
    )
    assert whole.texts == ("don't", "repeat", ",", "0000", "\n", "naïve", "x")
    assert whole.spelt[:4] == ("Don't", "repeat", ",", "1997")
    assert whole.of_token[:14].tolist() == [0, 0, 1, 1, 2, NOWHERE, 3, 3, 3, 4, 4, 5, 5, 6]
    assert np.flatnonzero(whole.is_first).tolist() == [0, 2, 4, 6, 9, 11, 13]
    assert whole.beside(0)[[0, 5]].tolist() == [0, NOWHERE]
    assert whole.beside(1)[[0, 1, 11, 13]].tolist() == [1, 1, NOWHERE, NOWHERE]
    assert whole.beside(-1)[[0, 3, 13]].tolist() == [NOWHERE, 0, NOWHERE]


def test_nothing_but_blanks_is_no_unit():
    empty = units_of([b" ", b"  "])
    assert empty.texts == ()
    assert empty.beside(1).tolist() == [NOWHERE, NOWHERE]
    assert company_of(empty, 0).topic_names == ((),)


@pytest.fixture(scope="module")
def planted() -> Units:
    """Documents about one of two things, of sentences whose nouns and verbs are drawn from those of their thing."""
    random = np.random.default_rng(0)
    nouns, verbs = (
        (["moon", "star", "orbit", "comet"], ["bread", "cake", "flour", "oven"]),
        (["shines", "turns"], ["bakes", "rises"]),
    )
    stretches = []
    for number in range(160):
        thing, words = number % 2, []
        for _ in range(12):
            words += [b" the", b" " + random.choice(nouns[thing]).encode(), b" " + random.choice(verbs[thing]).encode(), b"."]
        stretches.append(words)
    return units_of(*stretches)


def groups_among(of: np.ndarray, units: Units, words: list[str]) -> list[int]:
    return [int(of[units.texts.index(word)]) for word in words]


def test_groups_follow_use_and_documents_follow_their_subject(planted: Units):
    random = np.random.default_rng(0)
    company = company_of(planted, seed=0)
    nouns = groups_among(company.use.of, planted, ["moon", "star", "bread", "cake"])
    verbs = groups_among(company.use.of, planted, ["shines", "turns", "bakes", "rises"])
    assert not set(nouns) & set(verbs)
    vectors = document_vectors(planted, np.arange(len(planted.texts)), company.far)
    centres = k_means(vectors, 2, random)
    subject = nearest_of(vectors, centres)
    assert len(set(subject[::2].tolist())) == len(set(subject[1::2].tolist())) == 1
    assert subject[0] != subject[1]
    assert all(name for name in company.subject_names[:-1])


def test_groups_depend_on_seed_and_text_alone(planted: Units):
    first, second = (company_of(planted, seed=0) for _ in range(2))
    assert np.array_equal(first.meaning.of, second.meaning.of)
    assert first.topic_names == second.topic_names
    assert np.array_equal(first.subject_centres, second.subject_centres)


def test_a_passage_is_what_came_before_and_no_other_stretch(planted: Units):
    vectors = np.random.default_rng(1).normal(size=(len(planted.texts), 5))
    places = np.arange(len(planted.sequence))
    found = passage_vectors(planted, np.arange(len(planted.texts)), vectors, places)
    for place in (0, 5, 47, 48, 60, 100):
        start = max(place - 23, int(np.flatnonzero(planted.stretch == planted.stretch[place])[0]))
        want = vectors[planted.sequence[start : place + 1]].sum(0)
        np.testing.assert_allclose(found[place], want / np.linalg.norm(want), rtol=1e-9)
    unknown = passage_vectors(planted, np.full(len(planted.texts), NOWHERE), vectors, places[:3])
    assert not unknown.any()
    assert nearest_of(unknown, np.eye(5)).tolist() == [5, 5, 5]
