"""What a model is run on: token ids in any usual form, or text, framed as the harvest frames it (BOS first)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from everyscope.base.errors import ConfigError, ModelError, ShapeMismatch
from everyscope.text.blocks import markers_of
from everyscope.text.tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts as a model reads them, padded on the right to the longest."""

    input_ids: Int[Tensor, "batch ctx"]
    attention_mask: Bool[Tensor, "batch ctx"]
    """True for tokens, False for padding."""
    strings: list[list[str]]
    """Each text's tokens as text, without padding."""


Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray | Mapping[str, Any] | Tokens
"""Text or texts; token ids [ctx] or [batch ctx]; or what a tokenizer returns."""


def tokenize(model: Any, text: str | Sequence[str], tokenizer: Any = None) -> Tokens:
    """The tokens of one text or several, each with BOS before it (EOS where the tokenizer has no BOS), as SAEs are trained on.

    `tokenizer` is that of the model's name unless given. ModelError where that name leads to none.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ConfigError(f"text={str(text)[:60]!r}: expected one text or a list of texts with at least one")
    tokenizer = tokenizer_of(model) if tokenizer is None else tokenizer
    markers, rows = markers_of(tokenizer), []
    for one in texts:
        ids = tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append(ids if ids[:1] == [markers.bos] else [markers.bos, *ids])
    longest = max(map(len, rows))
    input_ids = torch.tensor([row + [markers.pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(longest)] for row in rows])
    return Tokens(input_ids, mask, [[tokenizer.decode([token]) for token in row] for row in rows])


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model: its own, or by the name or folder that it was loaded from; ModelError where it has none."""
    own = getattr(model, "tokenizer", None)
    if own is not None:
        return own
    name = getattr(model, "name_or_path", "")
    if not name:
        raise ModelError(
            f"{type(model).__name__} has no name to find its tokenizer by; pass tokenizer=..., or token ids for text"
        )
    return load_tokenizer(name)


def read_inputs(
    model: Any, inputs: Inputs, attention_mask: Tensor | None = None, tokenizer: Any = None
) -> tuple[Int[Tensor, "batch ctx"], Tensor | None]:
    """Token ids and attention mask (None for all) of whatever `inputs` are.

    ConfigError for what are no token ids and no text, ShapeMismatch for ids of another shape than [ctx] or [batch ctx].
    """
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise ConfigError(f"inputs have no input_ids, only {sorted(inputs)}; pass what the tokenizer returns, ids, or text")
        given = inputs.get("attention_mask") if attention_mask is None else attention_mask
        return _ids(inputs["input_ids"]), None if given is None else _matrix(torch.as_tensor(given))
    is_text = isinstance(inputs, str) or (isinstance(inputs, Sequence) and bool(inputs) and isinstance(inputs[0], str))
    tokens = tokenize(model, inputs, tokenizer) if is_text else inputs  # pyright: ignore[reportArgumentType]
    if isinstance(tokens, Tokens):
        padded = None if tokens.attention_mask.all() else tokens.attention_mask
        return tokens.input_ids, padded if attention_mask is None else _matrix(attention_mask)
    return _ids(tokens), None if attention_mask is None else _matrix(attention_mask)


def _ids(given: Any) -> Int[Tensor, "batch ctx"]:
    """Token ids as a matrix."""
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"inputs of type {type(given).__name__} are no token ids; pass text, or whole numbers [ctx] or [batch, ctx]"
        ) from error
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or not ids.numel():
        raise ConfigError(f"inputs of {ids.dtype}, shape {tuple(ids.shape)}, are no token ids; pass text, or whole numbers")
    return _matrix(ids)


def _matrix(x: Tensor) -> Tensor:
    """One sequence as a batch of one."""
    if x.ndim not in (1, 2):
        raise ShapeMismatch(f"inputs have shape {tuple(x.shape)}; expected token ids [ctx] or [batch, ctx]")
    return x[None] if x.ndim == 1 else x
