"""Documents as token ids, and which of them count. Many documents are tokenised at once, on all cores."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from everyscope.base.errors import TextError
from everyscope.text.config import TextConfig
from everyscope.text.conversations import rendered, spans_of
from everyscope.text.documents import Document
from everyscope.text.markers import Markers, has_bos_per_document, markers_of
from everyscope.text.tokenizer import readable_ids, unreadable_tokens

BATCH_DOCUMENTS = 64
"""Documents tokenised together, at most [documents]."""
BATCH_CHARACTERS = 1 << 19
"""Characters tokenised together, and one document more; as many cores as there are share them [characters]."""


@dataclass(frozen=True)
class Encoded:
    """One document, closed by EOS where the tokenizer has one."""

    ids: Int[np.ndarray, " tokens"]
    """int32."""
    counts: Bool[np.ndarray, " tokens"]
    """False for framing, for what roles leave out, and where the model has no embedding for the token."""
    begins_with_bos: bool
    """Whether the first token is BOS, for which a block's own can stand."""


def encoded(
    documents: Iterable[tuple[int, Document]], config: TextConfig, tokenizer: Any
) -> Iterator[tuple[int, Document, Encoded]]:
    """Each document with its number, encoded. TextError where a conversation or its roles cannot be read."""
    encoder = _Encoder(config, tokenizer)
    try:
        for batch in _batches(documents):
            found = encoder.encode([document for _, document in batch])
            for (number, document), its in zip(batch, found, strict=True):
                yield number, document, its
    finally:
        encoder.unreadable.close()


def _batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Few documents at first, for callers that want no more. What was read before an error is given out before it is raised."""
    batch: list[tuple[int, Document]] = []
    most, size = 1, 0
    try:
        for item in documents:
            batch.append(item)
            size += len(item[1].text)
            if len(batch) >= most or size >= BATCH_CHARACTERS:
                yield batch
                batch, most, size = [], min(2 * most, BATCH_DOCUMENTS), 0
    except TextError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


class _Encoder:
    """How documents of one corpus are encoded."""

    def __init__(self, config: TextConfig, tokenizer: Any) -> None:
        self._roles, self._tokenizer, self._has_prefix = config.roles, tokenizer, bool(config.prefix)
        self._markers: Markers = markers_of(tokenizer)
        self._has_bos = has_bos_per_document(config, tokenizer)
        self.unreadable = unreadable_tokens()
        if self._roles is not None and not tokenizer.is_fast:
            raise TextError(
                f"roles={self._roles}: tokenizer {tokenizer.name_or_path!r} does not map its tokens to characters; "
                "give a model with a tokenizer.json, or leave roles out"
            )

    def encode(self, documents: list[Document]) -> list[Encoded]:
        texts = [
            document.text if document.messages is None else rendered(self._tokenizer, document.messages, document.name)
            for document in documents
        ]
        has_roles = self._roles is not None
        found = self._tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=has_roles)
        result = []
        for number, (document, text) in enumerate(zip(documents, texts, strict=True)):
            ids = found["input_ids"][number]
            is_in_role = (
                self._is_in_role(document, text, found["offset_mapping"][number]) if has_roles else np.ones(len(ids), np.bool_)
            )
            result.append(self._framed(ids, is_in_role, document.name))
        return result

    def _is_in_role(self, document: Document, text: str, offsets: list[tuple[int, int]]) -> Bool[np.ndarray, " tokens"]:
        """Whether a token has a character of what one of the wanted roles says."""
        wanted = self._roles
        assert wanted is not None
        if document.messages is None:
            raise TextError(f"{document.name}: holds text, not messages, so that roles={wanted} mean nothing; leave roles out")
        spans = spans_of(self._tokenizer, document.messages, text, wanted.__contains__, document.name)
        begin, end = np.array(offsets, np.int64).reshape(-1, 2).T
        is_in_role = np.zeros(len(offsets), np.bool_)
        for start, stop in spans:
            is_in_role |= (begin < stop) & (np.maximum(end, begin + 1) > start)
        return is_in_role

    def _framed(self, tokens: list[int], is_in_role: Bool[np.ndarray, " tokens"], name: str) -> Encoded:
        """With BOS and EOS where packing wants them. A document that brings its own is not given a second one."""
        markers = self._markers
        ids, is_readable = readable_ids(self._tokenizer, tokens, name, self.unreadable)
        counts = is_in_role & is_readable & ~np.isin(ids, markers.always_masked)
        has_own = len(ids) > 0 and ids[0] == markers.bos
        if has_own and markers.bos not in markers.turns:  # where BOS stands is for packing to say
            ids, counts, has_own = ids[1:], counts[1:], False
        if self._has_bos and not has_own:
            ids, counts = np.append(np.int32(markers.bos), ids), np.append(False, counts)
        elif self._has_bos:
            counts[0] = False
        if markers.eos is not None and len(ids) > 0 and ids[-1] == markers.eos and not (len(ids) == 1 and self._has_bos):
            counts[-1] = False
        elif markers.eos is not None:
            ids, counts = np.append(ids, np.int32(markers.eos)), np.append(counts, False)
        is_turn_in_block = has_own and self._has_prefix  # a block's own BOS stands apart from it then
        return Encoded(ids, counts, begins_with_bos=(self._has_bos or has_own) and not is_turn_in_block)
