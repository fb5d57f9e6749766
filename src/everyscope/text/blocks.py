"""Tokens packed into blocks of equal length, with the one mask that all stages share.

A block is [BOS, prefix, text, suffix]. Documents follow one another in the text part, each closed by EOS, and are cut where
a block ends. BOS, EOS, padding and the prefix are inputs of the model but never enter statistics, training or metrics.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from everyscope.base.errors import TextError
from everyscope.text.config import Split, TextConfig
from everyscope.text.corpora import Document, read_documents

NO_DOCUMENT = -1
"""Stands in `Block.document` where a position holds no document's token."""


@dataclass(frozen=True)
class Cursor:
    """A place in a split of a corpus: all that is needed to go on from there."""

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
    """True where a position counts: everything but BOS, EOS, padding and the prefix; bool [ctx]."""
    after: Cursor
    """The place in the text behind this block."""


@dataclass(frozen=True)
class Markers:
    """The ids that frame text for one tokenizer."""

    bos: int
    """Starts every block: the tokenizer's BOS, or its EOS where it has none."""
    eos: int | None
    """Closes every document, where the tokenizer has one."""
    pad: int
    """Fills the last block of a split."""

    @property
    def masked(self) -> tuple[int, ...]:
        """Ids that never count."""
        return tuple({self.bos, self.pad} if self.eos is None else {self.bos, self.eos, self.pad})


def markers_of(tokenizer: Any) -> Markers:
    """The framing ids of a Hugging Face tokenizer; TextError where it has neither BOS nor EOS."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    start = eos if bos is None else bos
    if start is None:
        raise TextError(
            f"tokenizer {tokenizer.name_or_path!r} has neither BOS nor EOS; set tokenizer.bos_token to a token of its own"
        )
    return Markers(bos=start, eos=eos, pad=start if pad is None else pad)


def token_mask(input_ids: np.ndarray, markers: Markers, prefix_tokens: int) -> np.ndarray:
    """True where a token counts, [..., ctx] like `input_ids`: no BOS, EOS or padding, and behind BOS and prefix."""
    mask = ~np.isin(input_ids, markers.masked)
    mask[..., : 1 + prefix_tokens] = False
    return mask


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
    markers = markers_of(tokenizer)
    prefix, suffix = _encode(tokenizer, config.prefix), _encode(tokenizer, config.suffix)
    room = config.context - 1 - len(prefix) - len(suffix)
    if room < 1:
        framing = f"a prefix of {len(prefix)} and a suffix of {len(suffix)} tokens"
        raise TextError(f"context={config.context} leaves no room for text beside {framing}; raise context=...")
    head, tail = np.array([markers.bos, *prefix], np.int32), np.array(suffix, np.int32)

    def block(tokens: np.ndarray, numbers: np.ndarray, after: Cursor) -> Block:
        input_ids = np.full(config.context, markers.pad, np.int32)
        document = np.full(config.context, NO_DOCUMENT, np.int32)
        framed = np.concatenate([head, tokens, tail])
        input_ids[: len(framed)] = framed
        document[len(head) : len(head) + len(tokens)] = numbers
        document[len(head) + len(tokens) : len(framed)] = numbers[-1]
        return Block(input_ids, document, token_mask(input_ids, markers, len(prefix)), after)

    tokens, numbers, last = np.empty(0, np.int32), np.empty(0, np.int32), -1
    for number, document in enumerate(documents):
        if number < start.documents:
            continue
        skipped = start.tokens if number == start.documents else 0
        new = _encode(tokenizer, document.text) + ([] if markers.eos is None else [markers.eos])
        assert skipped <= len(new), f"{start} lies behind the {len(new)} tokens of {document.name}: another text or tokenizer"
        tokens = np.concatenate([tokens, np.array(new[skipped:], np.int32)])
        numbers = np.concatenate([numbers, np.full(len(new) - skipped, number, np.int32)])
        used = 0
        while len(tokens) - used >= room:
            taken = slice(used, used + room)
            used += room
            behind = len(new) - (len(tokens) - used)
            after = Cursor(number + 1, 0) if used == len(tokens) else Cursor(number, behind)
            yield block(tokens[taken], numbers[taken], after)
        tokens, numbers = tokens[used:], numbers[used:]
        last = number
    if len(tokens):
        yield block(tokens, numbers, Cursor(last + 1, 0))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
