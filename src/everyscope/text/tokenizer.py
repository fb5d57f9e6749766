"""Loading a tokenizer by the name of its model, and ids that the model can read."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from transformers import AutoConfig, AutoTokenizer

from everyscope.base.bundled import NO_CODE, model_location
from everyscope.base.errors import ModelError, first_line
from everyscope.text.tally import Tally

NUM_EMBEDDINGS = "everyscope_num_embeddings"
"""The attribute by which a tokenizer that was loaded here knows the size of its model's vocabulary."""


def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a bundled model, a local folder or a Hugging Face model; ModelError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_location(model), revision=revision, **NO_CODE)
    except Exception as error:  # a damaged tokenizer.json makes the tokenizers library raise Exception itself
        reason = first_line(error)
        raise ModelError(
            f"no tokenizer for model {model!r}: {reason}; give a bundled model, a local folder or a hub id"
        ) from error
    setattr(tokenizer, NUM_EMBEDDINGS, _num_embeddings(model, revision))
    return tokenizer


def _num_embeddings(model: str, revision: str | None) -> int | None:
    """Ids that the model has embeddings for; None where there is only a tokenizer, or the model's form is unknown."""
    try:
        config = AutoConfig.from_pretrained(model_location(model), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, without BOS and EOS."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []


def unreadable_tokens() -> Tally:
    """Counts what `readable_ids` replaces."""
    return Tally("tokens that the model has no embedding for", "they are replaced and not measured")


def readable_ids(
    tokenizer: Any, tokens: list[int], name: str, unreadable: Tally
) -> tuple[Int[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """The ids, int32, and which of them the model has an embedding for; others are replaced by the unknown token.

    A tokenizer can know more tokens than its model: Gemma 3's stands for images too. `name` is the document's, for the report.
    """
    ids, limit = np.array(tokens, np.int32), getattr(tokenizer, NUM_EMBEDDINGS, None)
    if limit is None:
        return ids, np.ones(len(ids), np.bool_)
    is_readable = ids < limit
    if not is_readable.all():
        beyond = int(ids[~is_readable][0])
        token = tokenizer.convert_ids_to_tokens(beyond)
        unreadable.add(int((~is_readable).sum()), f"{name}: {token!r} is token {beyond}, the model has {limit}")
        stand_ins = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        ids[~is_readable] = next(token for token in stand_ins if token is not None and token < limit)
    return ids, is_readable
