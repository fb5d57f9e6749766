"""The bundled tokenizer, loaded once."""

import pytest

from everyscope.text.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("tiny")
