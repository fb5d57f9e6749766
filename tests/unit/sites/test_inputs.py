"""Ids in all usual forms are the same ids; text is framed as the harvest frames it."""

import numpy as np
import pytest
import torch

from everyscope.base.errors import ConfigError, ModelError, ShapeMismatch
from everyscope.sites.capture import capture
from everyscope.sites.inputs import read_inputs, tokenize
from everyscope.sites.model import load_language_model
from everyscope.text.blocks import Cursor, pack
from everyscope.text.config import TextConfig
from everyscope.text.corpora import Document
from everyscope.text.tokenizer import load_tokenizer

TEXT = "def first(items):\n    return items[0]\n"


@pytest.fixture(scope="module")
def language():
    return load_language_model("tiny")


def test_every_form_of_ids_is_the_same_ids():
    want = torch.tensor([[2, 7, 9]])
    for given in (want, want[0], [2, 7, 9], [[2, 7, 9]], np.array([2, 7, 9]), {"input_ids": [2, 7, 9]}):
        ids, mask = read_inputs(None, given)
        assert torch.equal(ids, want)
        assert mask is None
    ids, mask = read_inputs(None, {"input_ids": want, "attention_mask": [[1, 1, 0]]})
    assert mask.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), [1.5, 2.0], [], None, [[1, 2], [3]], {"ids": [1]}, [object()], [True]])
def test_what_are_no_ids_is_one_clear_error(wrong):
    with pytest.raises(ConfigError) as caught:
        read_inputs(None, wrong)
    assert "\n" not in str(caught.value)


def test_ids_of_too_many_dimensions_are_refused():
    with pytest.raises(ShapeMismatch, match=r"\[batch, ctx\]"):
        read_inputs(None, torch.zeros(1, 2, 3, dtype=torch.long))


def test_text_is_tokenised_as_the_harvest_does_it(language):
    config = TextConfig(source="standard_library", context=32)
    block = next(iter(pack([Document("a", TEXT, "a")], config, language.tokenizer, Cursor())))
    tokens = tokenize(language, TEXT)
    count = tokens.input_ids.shape[1]
    assert tokens.input_ids[0].tolist() == block.input_ids[:count].tolist()
    assert tokens.input_ids[0, 0] == language.tokenizer.bos_token_id
    assert "".join(tokens.strings[0][1:]) == TEXT
    assert torch.equal(tokenize(language, language.tokenizer.bos_token + TEXT).input_ids, tokens.input_ids), "BOS is not doubled"


def test_capture_of_text_is_capture_of_its_ids_and_padding_changes_nothing(language):
    ids = tokenize(language, TEXT).input_ids
    want = capture(language, "resid_post.2", ids)
    assert torch.equal(capture(language, "resid_post.2", TEXT), want)
    assert torch.equal(capture(language, "resid_post.2", ids[0]), want)
    assert torch.equal(capture(language.model, "resid_post.2", TEXT), want), "found by the name that the model was loaded from"
    assert torch.equal(capture(language.model, "resid_post.2", TEXT, tokenizer=load_tokenizer("tiny")), want)
    both = tokenize(language, [TEXT + TEXT, TEXT])
    padded = capture(language, "resid_post.2", both)[1:, : ids.shape[1]]
    torch.testing.assert_close(padded, want, rtol=1e-5, atol=1e-5)
    assert both.attention_mask.sum(1).tolist() == [len(row) for row in both.strings]


def test_a_loaded_model_is_called_with_text_or_ids(language):
    want = language.model(input_ids=tokenize(language, TEXT).input_ids, use_cache=False).logits
    assert torch.equal(language(TEXT).logits, want)
    assert torch.equal(language(tokenize(language, TEXT).input_ids[0]).logits, want)


def test_a_model_without_a_name_needs_a_tokenizer():
    with pytest.raises(ModelError, match="tokenizer="):
        tokenize(torch.nn.Linear(1, 1), "text")
    with pytest.raises(ConfigError, match="at least one"):
        tokenize(torch.nn.Linear(1, 1), [])
