"""Loading a tokenizer by the name of its model."""

from typing import Any

from transformers import AutoTokenizer

from everyscope.base.bundled import NO_CODE, model_location
from everyscope.base.errors import ModelError, first_line


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a bundled model, a local folder or a Hugging Face model; ModelError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model_location(model), revision=revision, **NO_CODE)
    except Exception as error:  # a damaged tokenizer.json makes the tokenizers library raise Exception itself
        reason = first_line(error)
        raise ModelError(
            f"no tokenizer for model {model!r}: {reason}; give a bundled model, a local folder or a hub id"
        ) from error
