"""Tokens packed into blocks of equal length, with the one mask that all stages share.

A block is [BOS, prefix, text, suffix]. Documents follow one another in the text part, each closed by EOS, and are cut where
a block ends; with BOS per document, each also begins with BOS. What frames text is an input of the model but never enters
statistics, training or metrics: BOS, EOS, padding, the prefix, and `skip_positions` behind BOS.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from everyscope.base.errors import TextError
from everyscope.text.config import Split, TextConfig
from everyscope.text.corpora import read_documents
from everyscope.text.documents import Document
from everyscope.text.encoding import encoded
from everyscope.text.markers import markers_of
from everyscope.text.tokenizer import token_ids

NO_DOCUMENT = -1
"""Stands in `Block.document` where a position holds no document's token."""


@dataclass(frozen=True)
class Cursor:
    """A place in a split of a corpus: all that is needed to resume there."""

    documents: int = 0
    """Documents of this split that have been used up [documents]."""
    tokens: int = 0
    """Tokens of the next document that have been used [tokens]."""


@dataclass(frozen=True)
class Block:
    """`context` tokens that the model reads at once."""

    input_ids: np.ndarray
    """Token ids, int32 [ctx]."""
    document: np.ndarray
    """The running number, in its split, of the document that each token is from, or -1; int32 [ctx]."""
    mask: np.ndarray
    """True where a position counts: everything but BOS, EOS, padding, the prefix and what `TextConfig` leaves out; bool [ctx]."""
    after: Cursor
    """The place in the text behind this block."""


def read_blocks(config: TextConfig, tokenizer: Any, split: Split, start: Cursor | None = None) -> Iterator[Block]:
    """The blocks of one split from `start` on; TextError where the corpus has no document in it."""
    seen = dict.fromkeys(get_args(Split), 0)

    def documents() -> Iterator[Document]:
        for document in read_documents(config):
            its_split = document.split(config.held_out_fraction)
            seen[its_split] += 1
            if its_split == split:
                yield document

    yield from pack(documents(), config, tokenizer, start or Cursor())
    if not any(seen.values()):
        raise TextError(f"{config.origin}: holds no text, every document is empty; give documents with text in them")
    if not seen[split]:
        raise TextError(
            f"{config.origin}: none of its {sum(seen.values())} documents is {split}; a document's content decides its split: "
            f"give more documents or another held_out_fraction (now {config.held_out_fraction})"
        )


def pack(documents: Iterable[Document], config: TextConfig, tokenizer: Any, start: Cursor) -> Iterator[Block]:
    """Cut the token stream of `documents` into blocks; the last one is padded. Skips quickly to `start`.

    TextError where prefix and suffix leave no room for text.
    """
    frame = _Frame(config, tokenizer)
    pending = _Tokens.none()
    last = -1
    numbered = ((number, document) for number, document in enumerate(documents) if number >= start.documents)
    for number, document, new in encoded(numbered, config, tokenizer):
        skipped = start.tokens if number == start.documents else 0
        assert skipped <= len(new.ids), (
            f"{start} lies behind the {len(new.ids)} tokens of {document.name}: another text or tokenizer"
        )
        of_new = np.full(len(new.ids), number, np.int32)
        is_bos = np.zeros(len(new.ids), np.bool_)
        is_bos[:1] = new.begins_with_bos
        pending = pending.then(_Tokens(new.ids, of_new, new.counts, is_bos)[skipped:])
        while len(pending) - pending.opens >= frame.room:
            stop = pending.opens + frame.room  # the block's own BOS stands for that of a document which begins with the block
            taken, pending = pending[pending.opens : stop], pending[stop:]
            after = Cursor(number, len(new.ids) - len(pending)) if len(pending) else Cursor(number + 1, 0)
            yield frame.block(taken, after)
        last = number
    if len(pending) > pending.opens:
        yield frame.block(pending[pending.opens :], Cursor(last + 1, 0))


@dataclass(frozen=True)
class _Tokens:
    """A stretch of the token stream."""

    ids: np.ndarray
    document: np.ndarray
    counts: np.ndarray
    is_bos: np.ndarray
    """Where a document begins with BOS."""

    @classmethod
    def none(cls) -> "_Tokens":
        return cls(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.bool_))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "_Tokens":
        return _Tokens(self.ids[part], self.document[part], self.counts[part], self.is_bos[part])

    def then(self, others: "_Tokens") -> "_Tokens":
        pairs = zip(self._arrays, others._arrays, strict=True)
        return _Tokens(*(np.concatenate(pair) for pair in pairs)) if len(self) else others

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.ids, self.document, self.counts, self.is_bos

    @property
    def opens(self) -> int:
        """1 where the stretch begins with a document's BOS, else 0."""
        return int(self.is_bos[:1].sum())


class _Frame:
    """What stands around the text in every block."""

    def __init__(self, config: TextConfig, tokenizer: Any) -> None:
        self._context, self._markers = config.context, markers_of(tokenizer)
        prefix, suffix = token_ids(tokenizer, config.prefix), token_ids(tokenizer, config.suffix)
        self.room = config.context - 1 - len(prefix) - len(suffix)
        """Tokens of documents in a block [tokens]."""
        if self.room < 1:
            framing = f"a prefix of {len(prefix)} and a suffix of {len(suffix)} tokens"
            raise TextError(f"context={config.context} leaves no room for text beside {framing}; raise context=...")
        self._head, self._tail = np.array([self._markers.bos, *prefix], np.int32), np.array(suffix, np.int32)
        self._unmeasured = max(len(self._head), 1 + config.skip_positions)

    def block(self, text: _Tokens, after: Cursor) -> Block:
        input_ids = np.full(self._context, self._markers.pad, np.int32)
        document = np.full(self._context, NO_DOCUMENT, np.int32)
        mask = np.zeros(self._context, np.bool_)
        begin, end = len(self._head), len(self._head) + len(text)
        framed = np.concatenate([self._head, text.ids, self._tail])
        input_ids[: len(framed)] = framed
        document[begin:end] = text.document
        document[end : len(framed)] = text.document[-1]
        mask[begin:end] = text.counts
        mask[end : len(framed)] = ~np.isin(self._tail, self._markers.always_masked)
        mask[: self._unmeasured] = False
        return Block(input_ids, document, mask, after)
