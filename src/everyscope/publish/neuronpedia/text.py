"""The text that examples point into, ready for JSON: the vocabulary's tokens as literals, and the blocks' ids side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from jaxtyping import Int

from everyscope.base.errors import DataError
from everyscope.base.files import read_sealed
from everyscope.base.table_trial import Tried
from everyscope.base.tables import opened_table, read_table
from everyscope.publish.neuronpedia.json_columns import literals, shortened
from everyscope.publish.neuronpedia.latents import REMEDY, list_lengths
from everyscope.suite.layout import TEXT_FOLDER

SEQUENCES_FILE, VOCABULARY_FILE, MODEL_FILE = "sequences.parquet", "vocabulary.parquet", "model.json"
TOKEN_CHARACTERS = 100
"""Length to which a token's text is cut [characters]."""
NAME_CHARACTERS = 200
"""Length to which a document's name is cut [characters]."""


@dataclass(frozen=True, eq=False)
class SuiteText:
    """The vocabulary and all blocks of a suite."""

    tokens: pyarrow.Array
    """By id: the token's text. Bytes that are half a character are U+FFFD, and no text is empty."""
    input_ids: Int[np.ndarray, " places"]
    """All blocks, one behind the other."""
    starts: Int[np.ndarray, " blocks_and_end"]
    """Where each block begins in them, and last where they end."""
    documents: pyarrow.Array
    """Names of documents, block by block."""
    document_blocks: Int[np.ndarray, " documents"]
    document_starts: Int[np.ndarray, " documents"]
    """Block and position at which each of them begins."""
    num_layers: int
    d_model: int
    """Of the language model."""

    def document_names(self, blocks: Int[np.ndarray, " k"], positions: Int[np.ndarray, " k"]) -> pyarrow.Array:
        """The name of the document at each place, as a JSON string; null where nothing tells it."""
        span = np.int64(2**32)
        found = np.searchsorted(self.document_blocks * span + self.document_starts, blocks * span + positions, "right") - 1
        is_known = (found >= 0) & (np.append(self.document_blocks, -1)[found] == blocks)
        return self.documents.take(pyarrow.array(found, mask=~is_known)).fill_null("null")


def text_tables(suite: Path) -> list[Path]:
    """The tables that `read_text` reads, as far as they are there."""
    paths = [suite / TEXT_FOLDER / name for name in (VOCABULARY_FILE, SEQUENCES_FILE)]
    return [path for path in paths if path.is_file()]


def read_text(suite: Path, tables: Tried) -> SuiteText:
    """The text of a suite, whose `tables` were tried; DataError where it has none, DamagedData where it cannot be read."""
    folder = suite / TEXT_FOLDER
    for path in text_tables(suite):
        tables.require(path)
    for name in (VOCABULARY_FILE, SEQUENCES_FILE, MODEL_FILE):
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: missing, the suite is not described; run `everyscope describe` and publish again")
    blocks = _table(folder / SEQUENCES_FILE, ["input_ids"], ["document_starts", "documents", "first_document"])
    ids = blocks["input_ids"].combine_chunks()
    lengths = list_lengths(ids)
    names, document_blocks, document_starts = _documents(blocks)
    model = read_sealed(folder / MODEL_FILE, REMEDY)
    try:
        num_layers, d_model = int(model["num_layers"]), int(model["d_model"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / MODEL_FILE}: has no num_layers or no d_model; describe and publish again") from error
    text = SuiteText(
        tokens=_vocabulary(folder / VOCABULARY_FILE),
        input_ids=np.asarray(ids.flatten(), np.int64),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        documents=literals(shortened(name, NAME_CHARACTERS) for name in names),
        document_blocks=document_blocks,
        document_starts=document_starts,
        num_layers=num_layers,
        d_model=d_model,
    )
    if len(text.input_ids) and not 0 <= text.input_ids.min() <= text.input_ids.max() < len(text.tokens):
        raise DataError(
            f"{folder / SEQUENCES_FILE}: has tokens beyond the vocabulary's {len(text.tokens)}; describe and publish again"
        )
    return text


def _vocabulary(path: Path) -> pyarrow.Array:
    table = _table(path, ["token", "text"], [])
    ids = np.asarray(table["token"], np.int64)
    if len(ids) and ids.min() < 0:
        raise DataError(f"{path}: has a token of number {ids.min()}; describe and publish again")
    texts = [f"⟨token {number}⟩" for number in range(int(ids.max(initial=-1)) + 1)]
    for number, text in zip(ids.tolist(), table["text"].to_pylist(), strict=True):
        texts[number] = shortened(text or "⟨empty⟩", TOKEN_CHARACTERS)
    return literals(texts)


def _documents(blocks: pyarrow.Table) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of documents with block and position at which they begin; older suites tell only the first of each block."""
    if {"documents", "document_starts"} <= set(blocks.schema.names):
        names, starts = blocks["documents"].combine_chunks(), blocks["document_starts"].combine_chunks()
        places = np.repeat(np.arange(len(names)), list_lengths(names))
        return names.flatten().fill_null("").to_pylist(), places, np.asarray(starts.flatten(), np.int64)
    if "first_document" in blocks.schema.names:
        return blocks["first_document"].fill_null("").to_pylist(), np.arange(len(blocks)), np.zeros(len(blocks), np.int64)
    return [], np.zeros(0, np.int64), np.zeros(0, np.int64)


def _table(path: Path, needed: list[str], wished: list[str]) -> Any:
    """The columns that are needed, and those of the wished that are there."""
    names = opened_table(path, REMEDY).schema_arrow.names
    if missing := [name for name in needed if name not in names]:
        raise DataError(f"{path}: has no column {missing[0]}; describe and publish again")
    return read_table(path, [*needed, *(name for name in wished if name in names)], REMEDY)
