"""Explain every alive latent of all trained SAEs: a label, who wrote it, and how well it predicts on documents it never saw.

The text is read once; SAEs are taken in groups that fit in memory, each for one pass of the model. An SAE whose explanations are
there under this config is skipped, without a pass. What a language model would cost is said, and refused where it passes a limit,
before it is asked anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everyscope.base.progress import human_count, meter, say
from everyscope.describe.explanations.budget import Budget, Quote, questions_per_latent, quote, refuse_beyond
from everyscope.describe.explanations.config import ExplainConfig
from everyscope.describe.explanations.endpoint import Endpoint
from everyscope.describe.explanations.firings import Firings, collect_firings
from everyscope.describe.explanations.judge import Judge
from everyscope.describe.explanations.offline import Ground, lay_ground, learn_labels, score_labels
from everyscope.describe.explanations.passages import Passages, read_passages
from everyscope.describe.explanations.replies import Replies, num_paid
from everyscope.describe.explanations.scores import MIN_CASES
from everyscope.describe.explanations.table import write_explanations
from everyscope.describe.explanations.targets import ExplainTarget, find_targets
from everyscope.describe.explanations.traits import Embed, traits_of
from everyscope.sae.files import read_sae
from everyscope.sites.model import load_language_model, quiet_transformers
from everyscope.text.pieces import special_tokens, token_pieces
from everyscope.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ExplainResult:
    """What an explanation left on disk."""

    out: Path
    """The folder of descriptions: <site>/layer_<L>/<SAE>/explanations.parquet."""
    num_explained: int
    """SAEs explained in this run."""
    num_skipped: int
    """SAEs whose explanations were there already."""
    quote: Quote | None
    """What the language model was expected to cost at most; None where none is configured, or nothing was left to ask."""
    budget: Budget | None
    """What it did cost; None where nothing was asked."""


def run(config: ExplainConfig) -> ExplainResult:
    """Write explanations.parquet for every SAE below `config.trained` that has none under this config yet.

    Latents that a language model labelled have a row of it before their offline row, and replies.parquet beside it keeps all
    questions and answers. Raises DataError (nothing trained, too little text), ConfigError (the cost passes a limit), ModelError
    and TextError (model, endpoint or text cannot be read), StorageError.
    """
    targets = find_targets(config)
    pending = [target for target in targets if not target.is_explained]
    skipped = len(targets) - len(pending)
    if not pending:
        return ExplainResult(config.out, 0, skipped, None, None)
    read = _read(config)
    expected = _quote(config, *read, pending)
    if expected is not None and config.endpoint is not None:
        say(f"  {expected.words(config.endpoint)}")
        if config.endpoint.is_quote_only:
            return ExplainResult(config.out, 0, skipped, expected, None)
        refuse_beyond(config.endpoint, expected)
    model = load_language_model(config.model).model
    ground = _ground(config, *read, model)
    if lack := lacking_windows(ground):
        say(f"  {lack}")
    budget = None if config.endpoint is None else Budget(config.endpoint)
    endpoint = None if config.endpoint is None or budget is None else Endpoint(config.endpoint, budget)
    _explain(ground, model, pending, endpoint)
    if budget is not None:
        spent = (
            f"{budget.requests} requests, {human_count(budget.prompt_tokens)} + {human_count(budget.completion_tokens)} tokens"
        )
        say(f"  asked: {spent}" + ("" if budget.cost is None else f", {budget.cost:.4f} at the given prices"))
    return ExplainResult(config.out, len(pending), skipped, expected, budget)


def run_share(config: ExplainConfig, progress: Callable[[int], None]) -> None:
    """One of the jobs that share an explanation without a language model; `progress` is called with latents."""
    quiet_transformers()
    pending = [target for target in find_targets(config) if not target.is_explained]
    if pending:
        model = load_language_model(config.model).model
        _explain(_ground(config, *_read(config), model), model, pending, None, progress)


def _read(config: ExplainConfig) -> tuple[Passages, list[bytes]]:
    """The text, and the bytes of every token."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    return read_passages(config, tokenizer), text_pieces(tokenizer)


def _ground(config: ExplainConfig, passages: Passages, pieces: list[bytes], model: Any) -> Ground:
    """Traits and windows of the text; of the model, its embedding is read."""
    traits = traits_of(passages, pieces, config.language, embedding_of(model), config.seed)
    return lay_ground(config, passages, traits)


def embedding_of(model: Any) -> Embed:
    """The model's own embedding, by token ids."""
    weight = model.get_input_embeddings().weight.detach()
    return lambda kinds: weight[torch.from_numpy(kinds).to(weight.device)].float().cpu().numpy()


def lacking_windows(ground: Ground) -> str | None:
    """What to say where too little text is left to check rules or to score labels; None where there is enough."""
    counts = [len(windows) for windows in (ground.learn, ground.check, ground.score)]
    if min(counts) >= 2 * MIN_CASES:
        return None
    size, ctx = ground.config.window_tokens, ground.passages.input_ids.shape[1]
    found = "{} windows of {} tokens to learn on, {} to check rules on, {} to score labels on".format(
        counts[0], size, *counts[1:]
    )
    cure = f"set window_tokens to {max(ctx // 2, 2)} or less" if 2 * (ctx - 1) < size else "read more blocks"
    return f"{found}; at least {2 * MIN_CASES} of each are needed, so labels have no rules or no scores: {cure}"


def text_pieces(tokenizer: Any) -> list[bytes]:
    """The bytes that each token adds to a text: none for those that frame it."""
    special = special_tokens(tokenizer)
    return [b"" if token in special else piece for token, piece in enumerate(token_pieces(tokenizer))]


def _quote(config: ExplainConfig, passages: Passages, pieces: list[bytes], targets: Sequence[ExplainTarget]) -> Quote | None:
    """What asking about these SAEs may cost; None where no language model is to be asked."""
    asked = [target for target in targets if target.endpoint is not None]
    if not asked or config.endpoint is None:
        return None
    lengths = np.array([len(piece) for piece in pieces])
    window_bytes = float(lengths[passages.input_ids[passages.mask]].mean()) * config.window_tokens
    return quote(config.endpoint, len(asked), window_bytes, sum(num_paid(target.out) for target in asked))


def _explain(
    ground: Ground,
    model: Any,
    targets: Sequence[ExplainTarget],
    endpoint: Endpoint | None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """All SAEs, a group at a time; `progress` is called with latents in place of a bar."""
    config = ground.config
    device = torch.device(config.model.device)
    size, num_blocks = config.saes_per_pass, len(ground.passages.input_ids)
    for start in range(0, len(targets), size):
        group = targets[start : start + size]
        saes = [(target.site, read_sae(target.folder)[0].to(device), target.limits) for target in group]
        with meter("read", num_blocks, "blocks") as bar:
            found = collect_firings(model, saes, ground.passages, config.batch_blocks, bar.advance)
        with meter("explain", sum(firings.d_sae for firings in found), "latents") as bar:
            done = progress or bar.advance
            for target, firings in zip(group, found, strict=True):
                explain_sae(ground, target, firings, endpoint, done)


def explain_sae(
    ground: Ground, target: ExplainTarget, firings: Firings, endpoint: Endpoint | None, done: Callable[[int], None]
) -> None:
    """Label and score the latents of one SAE and write its files; `done` is called with latents."""
    offline = score_labels(ground, firings, learn_labels(ground, firings, done))
    facts: dict[str, Any] = {"identity": target.identity, **_facts(ground)}
    if target.endpoint is None:
        write_explanations(target.file, offline, facts)
        return
    assert endpoint is not None, f"{target.name} is to be labelled by an endpoint, and none is configured"
    replies = Replies(target.out)
    try:
        total = target.endpoint.num_latents * questions_per_latent(target.endpoint)
        with meter("ask", total, "answers") as progress:
            judged = Judge(ground, target.endpoint, endpoint, replies, progress.advance).explain(firings)
    except BaseException:
        replies.close()
        raise
    replies.seal()
    facts |= {"num_asked": judged.num_asked, "num_unparsed": judged.num_unparsed}
    if judged.num_unparsed:
        say(f"  {target.site} {target.name}: {judged.num_unparsed} of {judged.num_asked} answers were not what was asked for")
    write_explanations(target.file, [*judged.explanations, *offline], facts)


def _facts(ground: Ground) -> dict[str, Any]:
    """What the labels and scores rest on."""
    counts = np.bincount(ground.passages.part[ground.passages.part >= 0], minlength=3).tolist()
    documents = np.bincount(ground.passages.part_of_document, minlength=3).tolist()
    return {
        "num_tokens": dict(zip(("learn", "check", "score"), counts, strict=True)),
        "num_documents": dict(zip(("learn", "check", "score"), documents, strict=True)),
        "window_tokens": ground.config.window_tokens,
        "language": ground.config.language,
        "null": "labels of other latents of the same SAE on the same windows",
    }
