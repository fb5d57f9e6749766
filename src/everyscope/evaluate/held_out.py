"""The held-out blocks of an evaluation, read before the first pass, so that sums have their final shape from the start.

Documents are the units of every interval. More than MAX_UNITS are pooled in runs of neighbours: a bootstrap over pools of
independent documents is as valid, and the sums per unit, which hold a vector of d_in each, stay bounded.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from everyscope.base.errors import TextError
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.groups import Groups
from everyscope.evaluate.losses import counted_positions
from everyscope.evaluate.segments import SEGMENTS, segments_of, turns_of
from everyscope.text.blocks import read_blocks
from everyscope.text.tokenizer import load_tokenizer

MAX_UNITS = 1024
"""Units of resampling that are kept apart, at most [documents]."""


@dataclass(frozen=True)
class Batch:
    """Some blocks on the model's device, and the groups of what is in them."""

    start: int
    """Number of the first block."""
    input_ids: Int[Tensor, "batch ctx"]
    mask: Bool[Tensor, "batch ctx"]
    """True where a position counts."""
    units: Int[Tensor, "batch ctx"]
    """Unit of resampling, int64."""
    segments: Int[Tensor, "batch ctx"]
    """Speaker of each token, int64; 0 everywhere in text without turns."""

    @property
    def row_groups(self) -> Groups:
        """The groups of unmasked positions, in order: what activations[mask] is grouped by."""
        positions = torch.arange(self.mask.shape[1], device=self.mask.device).expand_as(self.mask)
        return _groups(self.units[self.mask], positions[self.mask], self.segments[self.mask])

    @property
    def loss_groups(self) -> Groups:
        """The groups of positions that count for the loss; its segment is that of the token that is predicted."""
        block, position = counted_positions(self.mask)
        return _groups(self.units[block, position], position, self.segments[block, position + 1])

    @property
    def block_of_loss(self) -> Int[Tensor, " n"]:
        """The number of the block of each of these positions."""
        return self.start + counted_positions(self.mask)[0]


def _groups(units: Int[Tensor, " n"], positions: Int[Tensor, " n"], segments: Int[Tensor, " n"]) -> Groups:
    """All axes; a turn is what one side says in one document."""
    return {"document": units, "position": positions, "segment": segments, "turn": units * len(SEGMENTS) + segments}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """All blocks that are read."""

    input_ids: Int[np.ndarray, "blocks ctx"]
    mask: Bool[np.ndarray, "blocks ctx"]
    units: Int[np.ndarray, "blocks ctx"]
    """Unit of resampling of each position; 0 where there is no document, which the mask leaves out."""
    segments: Int[np.ndarray, "blocks ctx"] | None
    """0 user, 1 model; None where the text has no turns."""
    num_documents: int
    """Documents that have an unmasked position in these blocks [documents]."""

    @property
    def num_sequences(self) -> int:
        """Blocks [blocks]."""
        return len(self.input_ids)

    @property
    def context(self) -> int:
        """Block length [tokens]."""
        return self.input_ids.shape[1]

    @property
    def identity(self) -> str:
        """Hash of all token ids."""
        return hashlib.sha256(np.ascontiguousarray(self.input_ids).tobytes()).hexdigest()[:16]

    @property
    def sizes(self) -> Mapping[str, int]:
        """Groups along the axes that losses have; turns only where the text has them."""
        units = int(self.units.max()) + 1
        turns = {} if self.segments is None else {"turn": units * len(SEGMENTS)}
        return {"document": units, "position": self.context, "segment": len(SEGMENTS), **turns}

    def batches(self, ranges: list[range], device: torch.device) -> Iterator[Batch]:
        """The blocks of each range as a batch on `device`."""
        for blocks in ranges:
            rows = slice(blocks.start, blocks.stop)
            segments = np.zeros_like(self.units[rows]) if self.segments is None else self.segments[rows]
            arrays = (self.input_ids[rows], self.units[rows], segments)
            input_ids, units, speakers = (torch.from_numpy(np.ascontiguousarray(part)).long().to(device) for part in arrays)
            yield Batch(blocks.start, input_ids, torch.from_numpy(self.mask[rows]).to(device), units, speakers)


def read_held_out(config: EvaluateConfig) -> HeldOut:
    """The `config.num_sequences` held-out blocks; TextError where there is no held-out text, or none that counts."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    blocks = list(islice(read_blocks(config.text, tokenizer, "held_out"), config.num_sequences * config.stride))
    segments = segments_of(blocks, config.text, turns_of(tokenizer))  # of all: a turn may cross the border of blocks
    blocks = blocks[:: config.stride]
    if not any(block.mask.any() for block in blocks):
        raise TextError(f"{config.text.origin}: its held-out documents have no countable token; give more text")
    documents, mask = np.stack([block.document for block in blocks]), np.stack([block.mask for block in blocks])
    present = np.unique(documents[mask])
    units = np.searchsorted(present, documents)
    if len(present) > MAX_UNITS:
        units = units * MAX_UNITS // len(present)
    return HeldOut(
        np.stack([block.input_ids for block in blocks]),
        mask,
        np.where(mask, units, 0),
        None if segments is None else segments[:: config.stride],
        len(present),
    )


def ranges_of(num_sequences: int, *stretches: tuple[int, int]) -> list[range]:
    """Blocks 0 to num_sequences in batches: for each (end, size), batches of `size` blocks up to block `end`."""
    found, start = [], 0
    for end, size in stretches:
        while start < min(end, num_sequences):
            found.append(range(start, min(start + size, end, num_sequences)))
            start = found[-1].stop
    return found
