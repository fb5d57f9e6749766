"""The blocks that descriptions rest on: half from training documents, half from held-out ones, each read once and kept.

Blocks of one document lie side by side and show the same thing, so of the training split only one in `train_stride` is taken.
A place is block * ctx + position: one number for a token, whatever batches the model reads them in.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool, Int8, Int32, Int64

from everyscope.base.errors import TextError
from everyscope.base.ids import unit_interval
from everyscope.base.progress import say
from everyscope.base.tables import write_table
from everyscope.describe.config import DescribeConfig
from everyscope.describe.targets import METADATA_KEY
from everyscope.text.blocks import NO_DOCUMENT, Block, Cursor, pack
from everyscope.text.config import Split
from everyscope.text.corpora import read_documents
from everyscope.text.documents import Document
from everyscope.text.markers import Markers, markers_of
from everyscope.text.pieces import special_tokens, token_pieces


def write_vocabulary(path: Path, tokenizer: Any) -> None:
    """vocabulary.parquet: token, its bytes, the same as text (with U+FFFD where they are none), and whether it is special."""
    pieces, special = token_pieces(tokenizer), special_tokens(tokenizer)
    table = pyarrow.table(
        {
            "token": pyarrow.array(range(len(pieces)), pyarrow.int32()),
            "piece": pyarrow.array(pieces, pyarrow.binary()),
            "text": pyarrow.array([piece.decode("utf-8", "replace") for piece in pieces], pyarrow.string()),
            "is_special": pyarrow.array([token in special for token in range(len(pieces))], pyarrow.bool_()),
        }
    )
    write_table(path, table, compression="zstd")


NO_HALF = -1
"""Stands where a token is in no half: it does not count."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """All blocks, those of training documents first."""

    input_ids: Int32[np.ndarray, "blocks ctx"]
    mask: Bool[np.ndarray, "blocks ctx"]
    """True where a position counts."""
    document: Int32[np.ndarray, "blocks ctx"]
    """Index into `documents`, or -1."""
    splits: tuple[Split, ...]
    """The split of each block."""
    documents: tuple[str, ...]
    """The name of each document that has a token here."""
    markers: Markers
    """The tokens that frame text."""

    @property
    def context(self) -> int:
        """Length of a block [tokens]."""
        return self.input_ids.shape[1]

    @cached_property
    def num_tokens(self) -> int:
        """Positions that count [tokens]."""
        return int(self.mask.sum())

    def without(self, places: Int32[np.ndarray, " tokens"]) -> "Sequences":
        """The same with these places masked too."""
        mask = self.mask.copy()
        mask.ravel()[places] = False
        return replace(self, mask=mask)

    def halves(self, seed: int) -> Int8[np.ndarray, " places"]:
        """0 or 1 for each place: in an order drawn by seed, each document goes to the half with fewer tokens; -1 if masked."""
        counted = np.where(self.mask, self.document, NO_DOCUMENT)
        counts = np.bincount(counted[counted >= 0], minlength=len(self.documents))
        order = sorted(range(len(counts)), key=lambda number: unit_interval(f"half {seed} {number}"))
        half_of, totals = np.zeros(len(counts), np.int8), [0, 0]
        for number in order:
            half = int(totals[1] < totals[0])
            half_of[number] = half
            totals[half] += int(counts[number])
        return np.append(half_of, np.int8(NO_HALF))[counted.ravel()]

    def bounds(self) -> tuple[Int64[np.ndarray, " places"], Int64[np.ndarray, " places"]]:
        """For each place, the first place and the one behind the last that a window around it may show.

        A window stays in its block, and between the nearest BOS tokens, which never are in it.
        """
        num_places = self.input_ids.size
        places = np.arange(num_places).reshape(self.input_ids.shape)
        is_bos = (self.input_ids == self.markers.bos) & ~self.mask  # as the marker of a turn it is text
        start, stop = places[:, :1], places[:, :1] + self.context
        first = np.maximum.accumulate(np.where(is_bos, places + 1, start), axis=1)
        to_the_right = np.concatenate([np.where(is_bos, places, stop)[:, 1:], stop], axis=1)
        last = np.minimum.accumulate(to_the_right[:, ::-1], axis=1)[:, ::-1]
        return first.ravel(), last.ravel()


def read_sequences(config: DescribeConfig, tokenizer: Any) -> Sequences:
    """The configured blocks; TextError where a split has none."""
    wanted: dict[Split, int] = {"train": -(-config.num_sequences // 2), "held_out": config.num_sequences // 2}
    blocks: list[Block] = []
    splits: list[Split] = []
    numbers: list[np.ndarray] = []
    names: list[str] = []
    for split, count in wanted.items():
        stride = config.train_stride if split == "train" else 1
        found, titles = _read_split(config, tokenizer, split, count, stride)
        if not found:
            raise TextError(
                f"{config.text.origin}: no {split} document has a token; both splits are described: "
                f"give more documents or another held_out_fraction (now {config.text.held_out_fraction})"
            )
        if len(found) < count:
            say(f"The {split} text ends after {len(found)} of {count} sequences; descriptions are of those")
        document = np.stack([block.document for block in found])
        used = np.unique(document[document != NO_DOCUMENT])
        numbers.append(np.where(document == NO_DOCUMENT, NO_DOCUMENT, np.searchsorted(used, document) + len(names)))
        names += [titles[number] for number in used]
        blocks += found
        splits.extend(split for _ in found)
    document = np.concatenate(numbers).astype(np.int32)
    return Sequences(
        input_ids=np.stack([block.input_ids for block in blocks]),
        mask=np.stack([block.mask for block in blocks]) & (document >= 0),
        document=document,
        splits=tuple(splits),
        documents=tuple(names),
        markers=markers_of(tokenizer),
    )


def _read_split(config: DescribeConfig, tokenizer: Any, split: Split, count: int, stride: int) -> tuple[list[Block], list[str]]:
    """Every `stride`-th block of a split, `count` of them, and the names of its documents; a smaller stride in short text."""
    while True:
        names: list[str] = []

        def documents(names: list[str] = names) -> Iterator[Document]:
            for document in read_documents(config.text):
                if document.split(config.text.held_out_fraction) == split:
                    names.append(document.name)
                    yield document

        blocks = pack(documents(), config.text, tokenizer, Cursor())
        found = list(islice(blocks, 0, (count - 1) * stride + 1, stride))
        if len(found) == count or stride == 1:
            return found, names
        stride = max(1, stride // 2)


def write_sequences(path: Path, sequences: Sequences, identity: str) -> None:
    """sequences.parquet: the blocks, where in each its documents begin, and their names."""
    firsts, starts, names = [], [], []
    for document in sequences.document:
        changes = np.flatnonzero((np.diff(document, prepend=NO_DOCUMENT) != 0) & (document != NO_DOCUMENT))
        here = [sequences.documents[number] for number in document[changes]]
        starts.append(changes)
        names.append(here)
        firsts.append(here[0] if here else "")
    table = pyarrow.table(
        {
            "sequence": pyarrow.array(range(len(sequences.input_ids)), pyarrow.int32()),
            "split": pyarrow.array(sequences.splits, pyarrow.string()),
            "first_document": pyarrow.array(firsts, pyarrow.string()),
            "input_ids": pyarrow.array(list(sequences.input_ids), pyarrow.list_(pyarrow.int32())),
            "document_starts": pyarrow.array(starts, pyarrow.list_(pyarrow.int32())),
            "documents": pyarrow.array(names, pyarrow.list_(pyarrow.string())),
        }
    )
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps({"identity": identity})})
    write_table(path, table, compression="zstd", compression_level=9)
