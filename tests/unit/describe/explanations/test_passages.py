from typing import Any

import numpy as np
import pytest

from everyscope.base.errors import DataError
from everyscope.describe.explanations.passages import CHECK, LEARN, SCORE, Passages, cut_windows, join_blocks
from everyscope.describe.explanations.run import text_pieces
from everyscope.text.blocks import Block, Cursor, pack
from everyscope.text.config import TextConfig
from everyscope.text.documents import Document


def blocks_of(tokenizer: Any, *texts: str) -> list[Block]:
    return list(pack([Document("", text, text) for text in texts], TextConfig(context=16), tokenizer, Cursor()))


def test_parts_share_no_document(passages: Passages):
    documents = {part: set(passages.document.ravel()[passages.tokens_of(part)].tolist()) for part in (LEARN, CHECK, SCORE)}
    assert all(documents.values())
    assert not documents[LEARN] & documents[CHECK]
    assert not (documents[LEARN] | documents[CHECK]) & documents[SCORE]


def test_halves_are_about_equal(passages: Passages):
    learn, check = len(passages.tokens_of(LEARN)), len(passages.tokens_of(CHECK))
    assert 0.8 < learn / check < 1.25


def test_uncounted_tokens_have_no_part(passages: Passages):
    every = np.concatenate([passages.tokens_of(part) for part in (LEARN, CHECK, SCORE)])
    assert np.array_equal(np.sort(every), np.flatnonzero(passages.mask.ravel()))


def test_windows_lie_in_one_document_of_one_block(passages: Passages):
    for part in (LEARN, CHECK, SCORE):
        windows, seen = cut_windows(passages, part, 16), np.zeros(passages.input_ids.size, int)
        for number in range(len(windows)):
            tokens = windows.tokens(number)
            seen[tokens] += 1
            assert 8 <= len(tokens) <= 16
            assert set(passages.document.ravel()[tokens]) == {windows.document[number]}
            assert len(set(tokens // passages.input_ids.shape[1])) == 1
            assert (passages.part[tokens] == part).all()
            assert (windows.of_token[tokens] == number).all()
        assert seen.max() == 1
        assert np.array_equal(np.flatnonzero(seen), windows.inside)
        assert len(windows.inside) > 0.8 * (passages.part == part).sum()


def test_one_training_document_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="shows 1 document"):
        join_blocks(blocks_of(tokenizer, "x = 1\n" * 30), blocks_of(tokenizer, "y = 2\n"), seed=0)


def test_pieces_spell_the_text_and_frames_are_empty(tokenizer: Any):
    text = "def über(x):\n\treturn '😀 «naïve»'  # \u202e\n"
    pieces = text_pieces(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[number] for number in ids) == text.encode()
    assert pieces[tokenizer.bos_token_id] == pieces[tokenizer.eos_token_id] == b""
