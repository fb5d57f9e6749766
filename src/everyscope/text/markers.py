"""The ids that frame text for one tokenizer, and which of them are markers of turns as well.

Chat tokenizers may use one token for both: SmolLM2-Instruct's BOS is <|im_start|> and its EOS and padding are <|im_end|>. Where
packing puts such a token, it frames and is masked; where a conversation has it, it is text.
"""

from dataclasses import dataclass
from typing import Any

import jinja2

from everyscope.base.errors import TextError
from everyscope.text.config import TextConfig

EXCHANGES = [{"role": role, "content": "text"} for role in ("user", "assistant", "user", "assistant")]


@dataclass(frozen=True)
class Markers:
    """The ids that frame text for one tokenizer."""

    bos: int
    """Starts every block: the tokenizer's BOS, or its EOS where it has none."""
    eos: int | None
    """Closes every document, where the tokenizer has one."""
    pad: int
    """Fills the last block of a split."""
    turns: frozenset[int] = frozenset()
    """Those of the three that the chat template writes within a conversation, not only in front of it."""

    @property
    def always_masked(self) -> tuple[int, ...]:
        """Ids that never count, wherever they stand: those that text holds only as the mark of a document's border."""
        return tuple({self.bos, self.pad, *([] if self.eos is None else [self.eos])} - self.turns)


def markers_of(tokenizer: Any) -> Markers:
    """The framing ids of a Hugging Face tokenizer; TextError where it has neither BOS nor EOS."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    start = eos if bos is None else bos
    if start is None:
        raise TextError(
            f"tokenizer {tokenizer.name_or_path!r} has neither BOS nor EOS; set tokenizer.bos_token to a token of its own"
        )
    framing = {start, eos, start if pad is None else pad}
    return Markers(bos=start, eos=eos, pad=start if pad is None else pad, turns=_ids_of_turns(tokenizer, start) & framing)


def _ids_of_turns(tokenizer: Any, bos: int) -> frozenset[int]:
    """The ids in a rendered conversation behind the BOS that it may begin with; none where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    try:
        text = tokenizer.apply_chat_template(EXCHANGES, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # a template for something else than exchanges
        return frozenset()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return frozenset(ids[1:] if ids[:1] == [bos] else ids)


def has_bos_per_document(config: TextConfig, tokenizer: Any) -> bool:
    """Whether each document begins with BOS, as in the training of Gemma's models."""
    if config.bos == "by_family":
        return type(tokenizer).__name__.startswith("Gemma")
    return config.bos == "document"
