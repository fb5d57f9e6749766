"""Targets of a graph: the directions behind the final norm that logits read, and how much each counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from everyscope.base.errors import ConfigError
from everyscope.circuits.config import AttributionConfig, Contrast, Latent, Target
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.graph import TargetFacts


@dataclass(frozen=True, eq=False)
class LogitTargets:
    """Some directions, in order, and what is known of each."""

    vectors: list[Float[Tensor, " d_model"]]
    facts: tuple[TargetFacts, ...]
    start: Float[np.ndarray, " targets"]
    """How much each counts."""


def logit_targets(frozen: FrozenModel, target: Target, config: AttributionConfig, tokenizer: Any) -> LogitTargets:
    """The targets among the logits, none where the target is a latent; ConfigError for tokens that the model does not have.

    A logit reads its unembedding row less the mean row: adding to all logits alike changes no probability.
    """
    if isinstance(target, Latent):
        return LogitTargets([], (), np.zeros(0))
    rows, chances = frozen.unembedding.to(frozen.embed), frozen.logits.double().softmax(-1)
    if isinstance(target, Contrast):
        token, against = (token_id(one, len(rows), tokenizer) for one in (target.token, target.against))
        if token == against:
            raise ConfigError(f"the contrast is of {target.token!r} with itself; name two different tokens")
        text = f"{text_of(token, tokenizer)} − {text_of(against, tokenizer)}"
        facts = TargetFacts(token=token, text=text, against=against, probability=chances[token].item())
        return LogitTargets([rows[token] - rows[against]], (facts,), np.ones(1))
    chosen = likeliest(chances, config) if target is None else [token_id(one, len(rows), tokenizer) for one in target.tokens]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"target tokens {chosen}: expected one or more, each once")
    mean = rows.mean(0)
    found = [TargetFacts(token=one, text=text_of(one, tokenizer), probability=chances[one].item()) for one in chosen]
    return LogitTargets([rows[one] - mean for one in chosen], tuple(found), chances[chosen].cpu().numpy())


def likeliest(chances: Float[Tensor, " vocab"], config: AttributionConfig) -> list[int]:
    """The fewest tokens that together have the probability `logit_share`, at most `max_logits`."""
    top = chances.topk(min(config.max_logits, len(chances)))
    before = top.values.cumsum(0) - top.values
    return top.indices[before < config.logit_share].tolist()


def token_id(token: int | str, vocab: int, tokenizer: Any) -> int:
    """The id of a token given as id or text; ConfigError where a text is not one token."""
    if isinstance(token, int):
        if not 0 <= token < vocab:
            raise ConfigError(f"token {token}: the model has tokens 0 to {vocab - 1}")
        return token
    if tokenizer is None:
        raise ConfigError(f"token {token!r} is text, but this model has no tokenizer; give its id")
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = ", ".join(repr(text_of(one, tokenizer)) for one in ids)
        raise ConfigError(
            f"token {token!r} is {len(ids)} tokens ({parts}); give one token, with the space before it if it has one"
        )
    return ids[0]


def text_of(token: int, tokenizer: Any) -> str:
    """A token as text; its number where there is no tokenizer."""
    return f"#{token}" if tokenizer is None else tokenizer.decode([token])


def require_active(nodes: Sequence[int], target: Latent) -> int:
    """The one node of a target latent; ConfigError where it is not active there, or several SAEs have one of this number."""
    if len(nodes) > 1:
        example = f"mlp_out.{target.layer}.{target.position}.{target.latent}"
        raise ConfigError(
            f"latent {target.latent} of layer {target.layer}: {len(nodes)} SAEs have it; name its site, as in {example}"
        )
    if not nodes:
        raise ConfigError(
            f"latent {target.latent} of layer {target.layer} is not active at position {target.position}; "
            "choose an active one: the graph of the whole prompt lists them"
        )
    return nodes[0]
