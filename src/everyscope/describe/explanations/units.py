"""Words, numbers and signs of a text, whole, whatever the tokens that they are cut into."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

UNIT = re.compile(rb"(?P<word>[A-Za-z_\x80-\xff][\w\x80-\xff]*(?:(?:'|\xe2\x80\x99)[A-Za-z]+)*)|(?P<number>\d[\d.,]*)|\n+|[^\s]")
"""A word with its apostrophes, a number, a run of line breaks, or any other sign by itself."""
NOWHERE = -1
LINE_BREAK = "\n"


@dataclass(frozen=True)
class Units:
    """The units of some blocks, one after another, and the unit that each token is in."""

    texts: tuple[str, ...]
    """What each kind of unit reads as, in lower case; numbers as `0` for each digit."""
    spelt: tuple[str, ...]
    """Each unit of the sequence as it is written."""
    sequence: Int[np.ndarray, " units"]
    """Kind of each unit, an index into `texts`."""
    stretch: Int[np.ndarray, " units"]
    """Number of the stretch that each is in: no unit of another stretch is beside it."""
    document: Int[np.ndarray, " units"]
    of_token: Int[np.ndarray, " tokens"]
    """Place in the sequence of each token's unit; NOWHERE for white space and for tokens that do not count."""
    is_first: Bool[np.ndarray, " tokens"]
    """True where a token is the first of its unit."""

    def beside(self, by: int) -> Int[np.ndarray, " tokens"]:
        """The kind of the unit `by` places on from each token's own, NOWHERE where there is none."""
        place = np.clip(self.of_token + by, 0, max(len(self.sequence) - 1, 0))
        own = np.maximum(self.of_token, 0)
        is_there = (self.of_token >= 0) & (self.of_token + by >= 0) & (self.of_token + by < len(self.sequence))
        if not len(self.sequence):
            return np.full(len(self.of_token), NOWHERE)
        return np.where(is_there & (self.stretch[place] == self.stretch[own]), self.sequence[place], NOWHERE)


def stretches_of(
    document: Int[np.ndarray, "blocks ctx"], mask: Bool[np.ndarray, "blocks ctx"]
) -> Iterator[Int[np.ndarray, " n"]]:
    """The tokens of each run of one document in one block, in order."""
    ctx = document.shape[1]
    for block in range(len(document)):
        counting = np.flatnonzero(mask[block])
        for run in np.split(counting, np.flatnonzero(np.diff(document[block, counting]) != 0) + 1):
            if len(run):
                yield block * ctx + run


def first_solid(piece: bytes) -> int:
    """Place of the first byte that is no blank; of a line break where there is none, else 0."""
    bare = len(piece) - len(piece.lstrip())
    return bare if bare < len(piece) else max(piece.find(b"\n"), 0)


def read_units(
    input_ids: Int[np.ndarray, "blocks ctx"],
    document: Int[np.ndarray, "blocks ctx"],
    mask: Bool[np.ndarray, "blocks ctx"],
    pieces: list[bytes],
) -> Units:
    """The units of all counting tokens."""
    flat, documents = input_ids.ravel(), document.ravel()
    solid = np.array([first_solid(piece) for piece in pieces])
    numbers: dict[str, int] = {}
    sequence: list[int] = []
    spelt: list[str] = []
    counts: list[int] = []
    owners: list[int] = []
    of_token, is_first = np.full(flat.size, NOWHERE, np.int64), np.zeros(flat.size, bool)
    for tokens in stretches_of(document, mask):
        parts = [pieces[number] for number in flat[tokens].tolist()]
        data = b"".join(parts)
        begins = np.cumsum([0, *map(len, parts)])[:-1]
        matches = list(UNIT.finditer(data))
        counts.append(len(matches))
        owners.append(int(documents[tokens[0]]))
        if not matches:
            continue
        starts, stops = (np.array([match.span()[end] for match in matches]) for end in (0, 1))
        at = begins + solid[flat[tokens]]
        unit = np.searchsorted(starts, at, side="right") - 1
        is_inside = (unit >= 0) & (at < stops[unit]) & np.array([bool(part) for part in parts])
        of_token[tokens] = np.where(is_inside, unit + len(sequence), NOWHERE)
        is_first[tokens] = is_inside & (at == starts[unit])
        for match in matches:
            text = match[0].decode("utf-8", "replace")
            spelt.append(text)
            sequence.append(numbers.setdefault(_kind(match, text), len(numbers)))
    stretch = np.repeat(np.arange(len(counts)), counts)
    return Units(
        tuple(numbers),
        tuple(spelt),
        np.array(sequence, np.int64),
        stretch,
        np.array(owners, np.int64)[stretch] if len(stretch) else stretch,
        of_token,
        is_first,
    )


def _kind(match: re.Match[bytes], text: str) -> str:
    if match.lastgroup == "word":
        return text.lower().replace("’", "'")
    if match.lastgroup == "number":
        return re.sub(r"\d", "0", text)
    return LINE_BREAK if text[0] == "\n" else text
