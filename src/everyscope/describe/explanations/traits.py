"""What can be said of a token by looking at the text alone: families of traits, each with one value per token.

A rule is made of sets of values, so everything that a label says can be looked up in text that no model has read. `traits_of`
numbers values over the blocks it is given; a value that only held-out text has cannot be learnt, for no training token has it.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from everyscope.describe.explanations.company import Company, company_of, document_vectors, nearest_of, passage_vectors
from everyscope.describe.explanations.config import Syntax
from everyscope.describe.explanations.passages import Passages
from everyscope.describe.explanations.space import Space, kinds_of, space_of
from everyscope.describe.explanations.syntax import KINDS, scan
from everyscope.describe.explanations.units import NOWHERE, Units, first_solid, read_units
from everyscope.describe.explanations.word_classes import CLASSES, ENDING_NAMES, NO_UNIT, SENTENCE_ENDS, class_of, ending_of

SHAPES = (
    "line break",
    "white space",
    "lower-case word",
    "capitalised word",
    "word in capitals",
    "piece inside a word",
    "number",
    "bracket",
    "quote",
    "punctuation",
    "underscores",
    "text beyond ASCII",
)
"""Forms that a token can have, in any language."""
REPEATS = (
    "that is new in the text",
    "seen before in the text",
    "repeating a pair seen before",
    "repeating a stretch seen before",
)
"""How much of a token's past was seen before in its block: nothing, itself, with the token before it, with the two before."""
LINE_PLACES = ("first token of a line", "second token of a line", "third token of a line", "later token of a line")
"""Where in its line a token stands; the token that breaks the line is the last of it."""
WORD_PLACES = ("a whole word", "the first piece of a word", "a later piece of a word", "no word")
"""Where in its unit a token stands."""
SENTENCE_PLACES = (
    "first word of a sentence",
    "second word of a sentence",
    "third word of a sentence",
    "fourth word of a sentence",
    "later word of a sentence",
    "no word",
)
"""Where in its sentence a token's word stands."""
SHORT = 3
"""Values that a set of a family with few values holds at most: half of a small family is no label."""
LONG = 5
"""Values that a set of a family with many values holds at most."""


@dataclass(frozen=True)
class TraitFamily:
    """One trait of every token."""

    name: str
    values: Int[np.ndarray, " tokens"]
    """Value of each token of all blocks, in order."""
    keys: tuple[Hashable, ...]
    """What each value stands for."""
    max_values: int
    """Values that a set of this family holds at most."""


@dataclass(frozen=True)
class Traits:
    """All families, over the same tokens."""

    families: dict[str, TraitFamily]
    pieces: list[bytes]
    """The bytes of every token id."""
    space: Space
    """Where the tokens stand in the model's embedding."""


Embed = Callable[[Int[np.ndarray, " kinds"]], Float[np.ndarray, "kinds d"]]
"""The embeddings of some token ids."""


def traits_of(passages: Passages, pieces: list[bytes], language: Syntax, embed: Embed, seed: int = 0) -> Traits:
    """Every family over all tokens of `passages`; groups of words are found in their background, by `seed`."""
    flat = passages.input_ids.ravel().astype(np.int64)
    previous, second = _shifted(passages.input_ids, 1), _shifted(passages.input_ids, 2)
    texts = [piece.decode("utf-8", "replace") for piece in pieces]
    strip = np.unique([text.strip().lower() for text in texts], return_inverse=True)
    families = [
        numbered("token", flat.tolist(), LONG),
        _numbered_by("stripped", strip[1][flat], strip[0].tolist(), LONG),
        numbered("previous", previous.tolist(), LONG),
        numbered("pair", zip(previous.tolist(), flat.tolist(), strict=True), LONG),
        numbered("two before", zip(second.tolist(), previous.tolist(), strict=True), LONG),
        numbered("next", _shifted(passages.input_ids, -1).tolist(), LONG),
        _by_token("shape", flat, pieces, token_shape, SHAPES),
        numbered("position", _position_bucket(passages), 1),
        _numbered_by("repeat", _repeats(passages), REPEATS, SHORT),
    ]
    families += _by_stretch(passages, pieces, language)
    background = read_units(*passages.background, pieces)
    families += _prose(passages, pieces, company_of(background, seed))
    kinds = kinds_of(passages)
    return Traits({family.name: family for family in families}, pieces, space_of(passages, kinds, embed(kinds)))


def numbered(name: str, keys: Iterable[Hashable], max_values: int) -> TraitFamily:
    """The family whose values are `keys`, numbered in order of appearance."""
    numbers: dict[Hashable, int] = {}
    values = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int32)
    return TraitFamily(name, values, tuple(numbers), max_values)


def _numbered_by(name: str, values: np.ndarray, keys: Iterable[Hashable], max_values: int) -> TraitFamily:
    return TraitFamily(name, values.astype(np.int32), tuple(keys), max_values)


def _by_token(
    name: str, flat: np.ndarray, pieces: list[bytes], value_of: Callable[[bytes], str], values: tuple[str, ...]
) -> TraitFamily:
    table = np.array([values.index(value_of(piece)) for piece in pieces])
    return _numbered_by(name, table[flat], values, SHORT)


def _shifted(input_ids: np.ndarray, by: int) -> Int[np.ndarray, " tokens"]:
    """The token `by` places before each one of its block (after it, for a negative `by`), -1 where there is none."""
    moved = np.full(input_ids.shape, -1, np.int64)
    if by > 0:
        moved[:, by:] = input_ids[:, :-by]
    else:
        moved[:, :by] = input_ids[:, -by:]
    return moved.ravel()


def _position_bucket(passages: Passages) -> list[int]:
    """The last power of two at or below each position: 1, 2, 4, ... (0 for position 0)."""
    positions = np.arange(passages.input_ids.shape[1])
    buckets = np.where(positions > 0, 2 ** np.floor(np.log2(np.maximum(positions, 1))), 0).astype(int)
    return np.tile(buckets, len(passages.input_ids)).tolist()


def _repeats(passages: Passages) -> Int[np.ndarray, " tokens"]:
    """For each token, the longest of (itself), (one before, itself), (two before, itself) that its block had before."""
    found = np.zeros(passages.input_ids.shape, np.int64)
    for block, ids in enumerate(passages.input_ids.tolist()):
        seen: set[tuple[int, ...]] = set()
        for place in range(len(ids)):
            grams = [tuple(ids[place - size : place + 1]) for size in range(min(3, place + 1))]
            found[block, place] = next((size + 1 for size in (2, 1, 0) if size < len(grams) and grams[size] in seen), 0)
            seen.update(grams)
    return found.ravel()


def token_shape(piece: bytes) -> str:
    """Which of SHAPES a token is."""
    text = piece.decode("utf-8", "replace")
    bare = text.strip()
    if not bare:
        return "line break" if "\n" in text else "white space"
    if not bare.isascii():
        return "text beyond ASCII"
    if bare.isalpha():
        if not text[0].isspace() and bare.islower():
            return "piece inside a word"
        return "lower-case word" if bare.islower() else "word in capitals" if bare.isupper() else "capitalised word"
    if bare.strip("_") == "":
        return "underscores"
    if re.fullmatch(r"[\d.]*\d[\d.]*", bare):
        return "number"
    if bare[0] in "\"'" or bare[-1] in "\"'":
        return "quote"
    return "bracket" if bare[-1] in "()[]{}" else "punctuation"


def _prose(passages: Passages, pieces: list[bytes], company: Company) -> Iterator[TraitFamily]:
    """Families of words, their classes and their company, whatever tokens they are cut into."""
    units = read_units(passages.input_ids, passages.document, passages.mask, pieces)
    ours = np.append(company.looked_up(units), NOWHERE)  # of each kind, and of no unit
    begins = _begins_sentence(units)
    classes = {name: number for number, name in enumerate(CLASSES)}
    class_of_unit = np.array([classes[class_of(text, first)] for text, first in zip(units.spelt, begins, strict=True)], np.int64)
    class_of_unit = np.append(class_of_unit, classes[NO_UNIT])
    endings = np.append([ENDING_NAMES.index(ending_of(text)) for text in units.texts], 0)
    use, meaning = (np.append(groups.of, len(groups.names) - 1) for groups in (company.use, company.meaning))
    for where, by in (("", 0), ("previous ", -1), ("next ", 1)):
        kind = units.beside(by)
        yield _numbered_by(f"{where}word", kind + 1, ("", *units.texts), LONG)
        place = np.where(kind >= 0, units.of_token + by, len(units.sequence))
        yield _numbered_by(f"{where}class", class_of_unit[place], CLASSES, SHORT)
        yield _numbered_by(f"{where}use", use[ours[kind]], company.use.names, SHORT)
        yield _numbered_by(f"{where}meaning", meaning[ours[kind]], company.meaning.names, SHORT)
    yield _numbered_by("ending", endings[units.beside(0)], ENDING_NAMES, SHORT)
    yield _numbered_by("place in word", _word_places(units), WORD_PLACES, 1)
    yield _numbered_by("place in sentence", _sentence_places(units, begins), SENTENCE_PLACES, 1)
    places = np.arange(len(units.sequence))
    topic = nearest_of(passage_vectors(units, ours[:-1], company.far, places), company.topic_centres)
    subject = nearest_of(document_vectors(units, ours[:-1], company.far), company.subject_centres)
    topic = np.append(topic, len(company.topic_centres))
    subject = np.append(subject[units.document] if len(places) else subject[:0], len(company.subject_centres))
    yield _numbered_by("topic", topic[units.of_token], company.topic_names, SHORT)
    yield _numbered_by("subject", subject[units.of_token], company.subject_names, SHORT)


def _begins_sentence(units: Units) -> list[bool]:
    """For each unit whether a sentence begins with it, as far as its stretch shows."""
    found, before, stretch = [], "", -1
    for kind, number in zip(units.sequence.tolist(), units.stretch.tolist(), strict=True):
        text = units.texts[kind]
        is_first = number != stretch or before in SENTENCE_ENDS
        found.append(is_first)
        if number != stretch or not (before in SENTENCE_ENDS and not text[0].isalnum()):
            before = text
        stretch = number
    return found


def _word_places(units: Units) -> Int[np.ndarray, " tokens"]:
    """Index into WORD_PLACES."""
    tokens = np.bincount(units.of_token[units.of_token >= 0], minlength=max(len(units.sequence), 1))
    is_many = tokens[np.maximum(units.of_token, 0)] > 1
    found = np.where(~is_many, 0, np.where(units.is_first, 1, 2))
    return np.where(units.of_token >= 0, found, 3)


def _sentence_places(units: Units, begins: list[bool]) -> Int[np.ndarray, " tokens"]:
    """Index into SENTENCE_PLACES."""
    place, places = len(SENTENCE_PLACES) - 2, []
    for is_first in begins:
        place = 0 if is_first else min(place + 1, len(SENTENCE_PLACES) - 2)
        places.append(place)
    return np.array([*places, len(SENTENCE_PLACES) - 1], np.int64)[units.of_token]


def _by_stretch(passages: Passages, pieces: list[bytes], language: Syntax) -> Iterator[TraitFamily]:
    """Families that need the text between tokens: words, places in lines and, of Python, syntax."""
    size = passages.input_ids.size
    words: list[Hashable] = [""] * size
    places, kinds, depths = np.zeros(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64)
    statements: list[Hashable] = [""] * size
    for tokens, is_cut in _stretches(passages):
        parts = [pieces[number] for number in passages.input_ids.ravel()[tokens]]
        data = b"".join(parts)
        ends = np.cumsum([len(part) for part in parts])
        solid = [end - len(part) + first_solid(part) for end, part in zip(ends.tolist(), parts, strict=True)]
        places[tokens] = np.minimum(_line_places(parts), len(LINE_PLACES) - 1)
        whole = _words(data)
        for token, byte in zip(tokens.tolist(), solid, strict=True):
            words[token] = whole.get(byte, "")
        if language == "python" and data:
            read, at = scan(data, is_cut), np.minimum(solid, len(data) - 1)
            kinds[tokens], depths[tokens] = read.kinds[at], read.depths[at]
            for token, byte in zip(tokens.tolist(), at.tolist(), strict=True):
                statements[token] = read.statements[byte]
    if language == "python":
        yield numbered("identifier", words, LONG)
    yield _numbered_by("place in line", places, LINE_PLACES, 1)
    if language == "python":
        yield _numbered_by("kind", kinds, KINDS, SHORT)
        yield numbered("statement", statements, SHORT)
        yield _numbered_by("depth", depths, range(int(depths.max(initial=0)) + 1), 1)


def _stretches(passages: Passages) -> Iterator[tuple[Int[np.ndarray, " n"], bool]]:
    """Each run of one document in one block, and whether it may begin in the middle of that document."""
    ctx = passages.input_ids.shape[1]
    for block, (document, mask) in enumerate(zip(passages.document, passages.mask, strict=True)):
        counting = np.flatnonzero(mask)
        runs = np.split(counting, np.flatnonzero(np.diff(document[counting]) != 0) + 1)
        for number, run in enumerate(run for run in runs if len(run)):
            yield block * ctx + run, number == 0


def _words(data: bytes) -> dict[int, str]:
    """The word that each byte of a word is in: identifiers as a whole."""
    found = {}
    for match in re.finditer(rb"[A-Za-z_\x80-\xff][\w\x80-\xff]*", data):
        word = match[0].decode("utf-8", "replace")
        found.update(dict.fromkeys(range(match.start(), match.end()), word))
    return found


def _line_places(parts: list[bytes]) -> list[int]:
    """How many tokens of the same line stand before each; a token that ends a line still belongs to it."""
    places, count = [], 0
    for part in parts:
        places.append(count)
        count = 0 if b"\n" in part else count + 1
    return places
