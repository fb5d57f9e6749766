"""Who speaks, found by the tokenizer's own markers."""

from types import SimpleNamespace

import numpy as np
import pytest

from everyscope.evaluate.segments import segments_of, turns_of
from everyscope.text.blocks import Cursor, pack
from everyscope.text.chats import END_OF_TURN, MODEL_TURN, USER_TURN, chat
from everyscope.text.config import TextConfig
from everyscope.text.documents import Document
from everyscope.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny-it")
CHATS = [("Write the body.\n\ndef f(x):", "    return x"), ("Which function does this?\n\nReads a file.", "def read(path):")]


def blocks_of(texts: list[str], **fields):
    config = TextConfig(**{"context": 24, **fields})
    return list(pack([Document(str(n), text, text) for n, text in enumerate(texts)], config, TOKENIZER, Cursor())), config


def spoken(blocks, segments: np.ndarray, speaker: int) -> str:
    """What one of the two says, in order, as text."""
    ids = np.concatenate([block.input_ids for block in blocks])
    mask = np.concatenate([block.mask for block in blocks])
    return TOKENIZER.decode(ids[mask & (segments.reshape(-1) == speaker)])


@pytest.mark.parametrize("context", [5, 12, 24, 200])
def test_each_turn_is_its_speakers_even_where_blocks_cut_its_marker(context: int):
    blocks, config = blocks_of([chat(*both) for both in CHATS], context=context)
    segments = segments_of(blocks, config, turns_of(TOKENIZER))
    assert segments is not None
    answers = [f"{answer}{END_OF_TURN}" for _, answer in CHATS]
    # The marker's line break melts into the white space that the first answer begins with, and goes to the model with it.
    assert spoken(blocks, segments, 1) == "\n" + "".join(answers)
    requests = "".join(f"{USER_TURN}{request}{END_OF_TURN}{MODEL_TURN}" for request, _ in CHATS)
    assert spoken(blocks, segments, 0) == requests.replace(MODEL_TURN, MODEL_TURN.strip(), 1)


def test_a_turn_goes_on_in_the_next_block_and_ends_with_its_document():
    blocks, config = blocks_of([chat("Ask.", "word " * 40), "plain text follows here"], context=32)
    segments = segments_of(blocks, config, turns_of(TOKENIZER))
    assert segments is not None
    assert segments[1].all() or 1 in blocks[1].document
    document = np.stack([block.document for block in blocks])
    assert segments[document == 1].sum() == 0


def test_framed_blocks_begin_anew():
    turns = {"prefix": USER_TURN, "suffix": END_OF_TURN + MODEL_TURN}
    blocks, config = blocks_of(["some words of a person " * 12], **turns)
    segments = segments_of(blocks, config, turns_of(TOKENIZER))
    assert segments is not None
    mask = np.stack([block.mask for block in blocks])
    assert segments[:, :-1][mask[:, :-1]].sum() == 0


def test_text_without_turns_has_no_segments():
    blocks, config = blocks_of(["def f():\n    return 1\n" * 9])
    assert segments_of(blocks, config, turns_of(TOKENIZER)) is None
    assert segments_of(blocks, config, None) is None
    assert turns_of(SimpleNamespace(chat_template=None)) is None
