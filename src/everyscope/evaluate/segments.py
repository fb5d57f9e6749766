"""Who speaks: the user or the model. Turns are found by the markers that the tokenizer's own chat template writes.

A template is asked, not parsed: what it adds to open the model's turn is the marker of that turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from everyscope.text.blocks import NO_DOCUMENT, Block
from everyscope.text.config import TextConfig

Segment = Literal["user", "model"]
SEGMENTS: tuple[Segment, ...] = ("user", "model")
"""Their numbers are their places here."""
_WORD = "everyscope"


@dataclass(frozen=True)
class Marker:
    """The token ids that open a turn."""

    ids: tuple[int, ...]
    rest: tuple[int, ...]
    """The white space behind them, where it is tokens of its own: before white space of the text it may melt into that."""

    def ends(self, input_ids: Int[np.ndarray, " ctx"]) -> dict[int, int]:
        """Where the marker begins, and where what it opens begins."""
        if len(self.ids) > len(input_ids):
            return {}
        windows = np.lib.stride_tricks.sliding_window_view(input_ids, len(self.ids))
        found = {}
        for start in np.flatnonzero((windows == np.array(self.ids)).all(1)).tolist():
            end = start + len(self.ids)
            follows = tuple(input_ids[end : end + len(self.rest)].tolist())
            found[start] = end + len(self.rest) if follows == self.rest else end
        return found


@dataclass(frozen=True)
class Turns:
    """How turns begin for one tokenizer."""

    user: Marker
    model: Marker


def turns_of(tokenizer: Any) -> Turns | None:
    """How turns begin; None where there is no chat template, or where it marks them by nothing."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": _WORD}]
    bare = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before = bare.partition(_WORD)[0].removeprefix(tokenizer.bos_token or "")
    if not opened.startswith(bare) or not opened[len(bare) :].strip() or not before.strip():
        return None
    return Turns(_marker(tokenizer, before), _marker(tokenizer, opened[len(bare) :]))


def segments_of(blocks: Sequence[Block], config: TextConfig, turns: Turns | None) -> Int[np.ndarray, "blocks ctx"] | None:
    """0 where the user speaks and 1 where the model does, int8; None where no turn of the model is opened.

    A turn lasts until another is opened, across the end of a block too unless blocks are framed by a prefix or suffix, and
    ends with its document. Text before any marker, and markers themselves, are the user's: they are given to the model.
    """
    if turns is None or not blocks:
        return None
    documents = np.stack([block.document for block in blocks])
    places = np.arange(config.context)
    ends = np.where(documents != NO_DOCUMENT, places, 0).max(1, keepdims=True)
    is_text = (places > 0) & (places <= ends)  # without BOS and padding: a marker may stand on both sides of a block's end
    stream, document = np.stack([block.input_ids for block in blocks])[is_text], documents[is_text]
    begins_block = (places == 1)[None].repeat(len(blocks), 0)[is_text] & bool(config.prefix or config.suffix)
    to_model, to_user = turns.model.ends(stream), turns.user.ends(stream)
    if not to_model:
        return None
    follows = (document[1:] != NO_DOCUMENT) & (document[:-1] != NO_DOCUMENT)  # behind a prefix, that says who speaks
    begins_document = np.flatnonzero((document[1:] != document[:-1]) & follows) + 1
    events = dict.fromkeys((end for end in to_model.values() if end < len(stream)), 1)
    events |= dict.fromkeys([*np.flatnonzero(begins_block).tolist(), *begins_document.tolist(), *to_model, *to_user], 0)
    speaker = np.zeros(len(stream), np.int8)
    order = sorted(events)
    for start, stop in zip(order, [*order[1:], len(stream)], strict=True):
        speaker[start:stop] = events[start]
    found = np.zeros(documents.shape, np.int8)
    found[is_text] = speaker
    return found


def _marker(tokenizer: Any, text: str) -> Marker:
    def ids(part: str) -> tuple[int, ...]:
        return tuple(tokenizer(part, add_special_tokens=False)["input_ids"])

    whole, word = ids(text), ids(text.strip())
    return Marker(word, whole[len(word) :] if whole[: len(word)] == word else ())
