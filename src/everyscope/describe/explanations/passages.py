"""The text that explanations rest on: blocks of training and of held-out documents, and windows cut from them.

Each document has one part to play. The training documents are dealt into two halves: rules are learnt on one and checked on the
other. Held-out documents only score. A document's part is that of all its tokens, so no text is on both sides.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from everyscope.base.errors import DataError
from everyscope.describe.explanations.config import ExplainConfig
from everyscope.text.blocks import Block, read_blocks

LEARN, CHECK, SCORE, NO_PART = 0, 1, 2, -1
"""What a document is for: learning rules, checking them, scoring labels; NO_PART stands where a position has no document."""


class Background(NamedTuple):
    """Blocks of training documents."""

    input_ids: Int[np.ndarray, "blocks ctx"]
    document: Int[np.ndarray, "blocks ctx"]
    mask: Bool[np.ndarray, "blocks ctx"]


@dataclass(frozen=True)
class Passages:
    """Blocks of both splits, one after another; a token's number is block * ctx + position."""

    input_ids: Int[np.ndarray, "blocks ctx"]
    document: Int[np.ndarray, "blocks ctx"]
    """Running number of the document over both splits, or -1."""
    mask: Bool[np.ndarray, "blocks ctx"]
    """True where a position counts."""
    part_of_document: Int[np.ndarray, " documents"]
    """LEARN, CHECK or SCORE."""
    background: Background
    """All training text that was read, chosen or not: from it words' company is learnt."""

    @cached_property
    def part(self) -> Int[np.ndarray, " tokens"]:
        """The part of each token that counts, NO_PART for the others."""
        parts = np.append(self.part_of_document, NO_PART)[self.document.ravel()]
        return np.where(self.mask.ravel(), parts, NO_PART)

    @cached_property
    def is_training(self) -> Bool[np.ndarray, " tokens"]:
        """Which tokens count and are of training documents."""
        return (self.part == LEARN) | (self.part == CHECK)

    def tokens_of(self, part: int) -> Int[np.ndarray, " n"]:
        """The numbers of all counting tokens of a part, in order."""
        return np.flatnonzero(self.part == part)


def read_passages(config: ExplainConfig, tokenizer: Any) -> Passages:
    """The configured blocks; TextError where a split is empty, DataError where training shows fewer than two documents."""
    train = list(islice(read_blocks(config.text, tokenizer, "train"), config.num_sequences * config.block_stride))
    stride = max(len(train) // config.num_sequences, 1)
    held_out = islice(read_blocks(config.text, tokenizer, "held_out"), config.num_held_out_sequences)
    return join_blocks(train[::stride][: config.num_sequences], list(held_out), config.seed, train)


def join_blocks(train: list[Block], held_out: list[Block], seed: int, background: list[Block] | None = None) -> Passages:
    """Passages of these blocks, the training documents dealt into halves of about equally many tokens.

    `background` are more blocks of training documents; None where there are no others than `train`.
    """
    train_numbers, held_out_numbers = _renumbered(train), _renumbered(held_out)
    counts = np.bincount(train_numbers[train_numbers >= 0])
    if len(counts) < 2:
        raise DataError(
            f"the training text shows {len(counts)} document; rules learnt on one must be checked on another: "
            "read more blocks (num_sequences, block_stride)"
        )
    num_held_out = int(held_out_numbers.max(initial=-1)) + 1
    parts = np.concatenate([_halves(counts, seed), np.full(num_held_out, SCORE)])
    shifted = np.where(held_out_numbers >= 0, held_out_numbers + len(counts), -1)
    blocks = [*train, *held_out]
    return Passages(
        input_ids=np.stack([block.input_ids for block in blocks]),
        document=np.concatenate([train_numbers, shifted]),
        mask=np.stack([block.mask for block in blocks]) & (np.concatenate([train_numbers, shifted]) >= 0),
        part_of_document=parts,
        background=_background(train if background is None else background),
    )


def _background(blocks: list[Block]) -> Background:
    numbers = _renumbered(blocks)
    ids, mask = (np.stack([getattr(block, name) for block in blocks]) for name in ("input_ids", "mask"))
    return Background(ids, numbers, mask & (numbers >= 0))


def _renumbered(blocks: list[Block]) -> Int[np.ndarray, "blocks ctx"]:
    """The documents of some blocks of one split, numbered from 0 in order, -1 where there is none."""
    numbers = np.stack([block.document for block in blocks])
    return np.searchsorted(np.unique(numbers[numbers >= 0]), numbers) * (numbers >= 0) - (numbers < 0)


def _halves(counts: Int[np.ndarray, " documents"], seed: int) -> Int[np.ndarray, " documents"]:
    """LEARN or CHECK for each document: in an order drawn by seed, each goes to the half that has fewer tokens."""
    parts, sizes = np.empty(len(counts), np.int64), [0, 0]
    for document in np.random.default_rng(seed).permutation(len(counts)):
        half = int(sizes[CHECK] < sizes[LEARN])
        parts[document] = (LEARN, CHECK)[half]
        sizes[half] += int(counts[document])
    return parts


@dataclass(frozen=True)
class Windows:
    """Stretches of equal length, none of which crosses the border of a block or of a document."""

    start: Int[np.ndarray, " windows"]
    """Number of each window's first token."""
    length: Int[np.ndarray, " windows"]
    """Tokens; the last of a stretch may be shorter [tokens]."""
    document: Int[np.ndarray, " windows"]
    of_token: Int[np.ndarray, " tokens"]
    """The window of each token, or -1."""
    inside: Int[np.ndarray, " n"]
    """The numbers of all tokens that are in a window, in order."""

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.start)

    def tokens(self, window: int) -> Int[np.ndarray, " length"]:
        """The numbers of a window's tokens."""
        return np.arange(self.start[window], self.start[window] + self.length[window])

    def stretches(self, chosen: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " n"]]:
        """The tokens of some windows, one window after another, and where among them each window begins."""
        lengths = self.length[chosen]
        begins = np.cumsum(lengths) - lengths
        return np.repeat(self.start[chosen] - begins, lengths) + np.arange(lengths.sum()), begins


def cut_windows(passages: Passages, parts: tuple[int, ...], size: int) -> Windows:
    """All windows of `size` tokens of some parts, side by side; a remainder under half a window is left out."""
    ctx, part_of_token = passages.input_ids.shape[1], passages.part
    document = passages.document.ravel()
    tokens = np.flatnonzero(np.isin(part_of_token, parts))
    breaks = (np.diff(tokens) > 1) | (tokens[1:] % ctx == 0) | (np.diff(document[tokens]) != 0)
    starts, lengths = [], []
    for run in np.split(tokens, np.flatnonzero(breaks) + 1) if len(tokens) else []:
        for offset in range(0, len(run), size):
            length = min(size, len(run) - offset)
            if 2 * length >= size:
                starts.append(run[offset])
                lengths.append(length)
    start, length = np.array(starts, np.int64), np.array(lengths, np.int64)
    of_token = np.full(passages.input_ids.size, -1, np.int64)
    for number, (first, count) in enumerate(zip(starts, lengths, strict=True)):
        of_token[first : first + count] = number
    return Windows(start, length, document[start] if len(start) else start, of_token, np.flatnonzero(of_token >= 0))
