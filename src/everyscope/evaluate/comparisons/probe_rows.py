"""The tokens that probes are trained and tested on: blocks of single documents, with labels, and what the model makes of them.

Blocks are not packed here as elsewhere: a label belongs to characters of one document, and tokens are found by their offsets.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from everyscope.base.errors import TextError
from everyscope.evaluate.comparisons.config import ProbingConfig
from everyscope.evaluate.comparisons.labels import NO_LABEL, LabelledCorpus, Labels, token_labels
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.capture import capture
from everyscope.sites.names import Site, places_of
from everyscope.text.config import Split, TextConfig
from everyscope.text.documents import Document
from everyscope.text.markers import markers_of
from everyscope.text.tokenizer import readable_ids, unreadable_tokens

MAX_WITHOUT = 1000
"""Documents without labels in a row after which no more are tried: a corpus may be endless [documents]."""


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """Tokens of one split, in reading order."""

    blocks: tuple[Int[np.ndarray, " tokens"], ...]
    """The ids of each block, BOS left out; blocks differ in length."""
    labels: Int[np.ndarray, " rows"]
    """The label of each token of all blocks, or NO_LABEL."""
    document: Int[np.ndarray, " rows"]
    """The number of its document."""

    @property
    def num_documents(self) -> int:
        """Documents behind the rows [documents]."""
        return int(self.document[-1]) + 1


def read_rows(corpus: LabelledCorpus, config: ProbingConfig, tokenizer: Any, split: Split, num_tokens: int) -> ProbeRows:
    """The first `num_tokens` labelled tokens of a split, of each document evenly spread blocks.

    TextError where the split has none, or where the tokenizer cannot tell the characters of its tokens.
    """
    if not tokenizer.is_fast:
        raise TextError(
            f"tokenizer {tokenizer.name_or_path!r} does not map its tokens to characters; give a model with a tokenizer.json"
        )
    text = config.packing
    blocks: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    documents: list[np.ndarray] = []
    number, left, unreadable = 0, num_tokens, unreadable_tokens()
    for document, of_characters in _labelled(corpus, text, split):
        if left <= 0:
            break
        encoded = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, is_readable = readable_ids(tokenizer, encoded["input_ids"], document.name, unreadable)
        spans = encoded["offset_mapping"]
        for place in _places(len(ids), text, config.blocks_per_document):
            taken = slice(place.start, min(place.stop, place.start + left))
            blocks.append(ids[taken].astype(np.int64))
            labels.append(token_labels(document.text, of_characters, spans[taken]))
            labels[-1][: text.skip_positions] = NO_LABEL
            labels[-1][~is_readable[taken]] = NO_LABEL
            documents.append(np.full(len(ids[taken]), number))
            left -= len(ids[taken])
            if left <= 0:
                break
        number += len(ids) > 0
    if not blocks:
        raise TextError(f"{text.origin}: no {split} document has labels; give Python sources, or labels of your own in a .jsonl")
    return ProbeRows(tuple(blocks), np.concatenate(labels), np.concatenate(documents))


def _labelled(corpus: LabelledCorpus, text: TextConfig, split: Split) -> Iterator[tuple[Document, Labels]]:
    """The documents of a split that have labels, until MAX_WITHOUT in a row have none."""
    without = 0
    for document in corpus.documents():
        if document.split(text.held_out_fraction) != split:
            continue
        labels = corpus.label(document)
        without = without + 1 if labels is None else 0
        if labels is not None:
            yield document, labels
        elif without == MAX_WITHOUT:
            return


def _places(num_tokens: int, text: TextConfig, most: int) -> list[slice]:
    """At most `most` of the blocks that a document of `num_tokens` tokens falls into, evenly spread."""
    size = text.context - 1
    starts = np.arange(0, num_tokens, size)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
    return [slice(int(start), min(int(start) + size, num_tokens)) for start in starts]


@dataclass(frozen=True, eq=False)
class SiteActivations:
    """What coders at one site read on some rows."""

    x: Float[Tensor, "n d_in"]
    """float32, on the CPU."""
    is_usual: Bool[Tensor, " n"]
    """Rows that are massive in neither what is read nor what is written."""


def activations_at(
    model: nn.Module, tokenizer: Any, sites: Mapping[Site, NormLimits], rows: ProbeRows, batch_blocks: int
) -> Iterator[dict[Site, SiteActivations]]:
    """The activations at `sites` of all rows in order, some blocks at a time. Every block begins with BOS."""
    markers = markers_of(tokenizer)
    for start in range(0, len(rows.blocks), batch_blocks):
        batch = rows.blocks[start : start + batch_blocks]
        input_ids = torch.full((len(batch), 1 + max(map(len, batch))), markers.pad)
        input_ids[:, 0] = markers.bos
        is_row = torch.zeros_like(input_ids, dtype=torch.bool)
        for place, ids in enumerate(batch):
            input_ids[place, 1 : 1 + len(ids)] = torch.from_numpy(ids)
            is_row[place, 1 : 1 + len(ids)] = True
        found = {site: x.cpu()[is_row] for site, x in capture(model, places_of(sites), input_ids).items()}
        yield {site: _at(found[site.inputs[0]], found[site.outputs[0]], limits) for site, limits in sites.items()}


def _at(read: Float[Tensor, "n d_in"], written: Float[Tensor, "n d_out"], limits: NormLimits) -> SiteActivations:
    return SiteActivations(read.float(), ~limits.massive(read, written))
