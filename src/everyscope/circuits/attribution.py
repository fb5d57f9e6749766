"""Attribution: from a model, its transcoders and a prompt to a graph."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from everyscope.base.errors import ConfigError
from everyscope.circuits.choosing import coders_of
from everyscope.circuits.config import AttributionConfig, Latent, Target
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.gradient import GradientTracer
from everyscope.circuits.graph import ERROR, LATENT, LOGIT, TOKEN, CoderFacts, Graph, GraphFacts, level_of
from everyscope.circuits.influence import Edges, Pruned
from everyscope.circuits.replacement import LocalReplacement
from everyscope.circuits.selection import Kept, Say, select
from everyscope.circuits.targets import LogitTargets, logit_targets, require_active, text_of
from everyscope.sae.folded import Sae
from everyscope.sites.inputs import Inputs, read_inputs, tokenizer_of
from everyscope.sites.model import LanguageModel, bare
from everyscope.sites.names import SITE_KINDS, Site, SiteKind
from everyscope.sites.registry import adapter_of
from everyscope.sites.splice import special_ids
from everyscope.suite.reader import Suite, SuiteEntry

Coders = Suite | Mapping[Any, Sae | SuiteEntry] | Iterable[Sae | SuiteEntry]
"""Transcoders, at most one for each layer, or SAEs, at most one for each attn_out, mlp_out and resid_post: a suite's, or any
others."""


def attribute(
    model: nn.Module | LanguageModel,
    transcoders: Coders,
    inputs: Inputs,
    *,
    target: Target = None,
    config: AttributionConfig | None = None,
    tokenizer: Any = None,
    say: Say = lambda done, of: None,
) -> Graph:
    """The attribution graph of a prompt: what made the model's next token likely, through the latents of its transcoders.

    Attention patterns and norms' sizes are held as they are on this prompt; each MLP is its transcoder plus the error that it
    makes here, so that the graph is of the model itself. Latents of special tokens (BOS) do not count: there all that an MLP
    adds is error. `inputs` are one text, or the ids of one; BOS comes first as in training. `target` is a `TargetTokens`,
    `Contrast` or `Latent`; None takes the likeliest next tokens. SAEs in place of transcoders give an approximate graph, by
    activation times gradient from site to site. ConfigError where there is no coder, or two of one site.
    """
    config = config or AttributionConfig()
    language_model, model = model, bare(model)
    input_ids, _ = read_inputs(language_model, inputs, tokenizer=tokenizer)
    tokenizer = tokenizer or known_tokenizer(language_model)
    names, coders = by_site(transcoders)
    frozen = FrozenModel(model, adapter_of(model), input_ids)
    is_exact = all(coder.is_transcoder for coder in coders.values())
    counted = counted_tokens(model, input_ids[0])
    of_layer = {site.layer: coder for site, coder in coders.items()}
    tracer = LocalReplacement(frozen, of_layer, counted) if is_exact else GradientTracer(frozen, coders, counted)
    targets = logit_targets(frozen, target, config, tokenizer)
    columns = columns_of(tracer, targets, list(coders))
    kinds: list[SiteKind] = [site.kind for site in coders]
    if isinstance(target, Latent):
        is_it = (columns["kind"] == LATENT) & (columns["layer"] == target.layer)
        is_it &= (columns["position"] == target.position) & (columns["index"] == target.latent)
        is_it &= np.array([target.kind in (None, kind) for kind in kinds])[columns["coder"]]
        columns["start"][require_active(np.flatnonzero(is_it).tolist(), target)] = 1.0
    directions = [tracer.direction(vector) for vector in targets.vectors]
    kept = select(tracer, directions, columns["start"], level_of(columns["layer"], columns["coder"], kinds), config, say)
    texts = tuple(text_of(token, tokenizer) for token in input_ids[0].tolist())
    facts = GraphFacts(
        prompt=inputs
        if isinstance(inputs, str)
        else "".join(text for text, is_text in zip(texts, counted, strict=True) if is_text),
        tokens=texts,
        token_ids=tuple(input_ids[0].tolist()),
        model=str(getattr(language_model, "name", None) or getattr(model, "name_or_path", "") or type(model).__name__),
        num_layers=frozen.num_layers,
        method="replacement" if is_exact else "gradient",
        coders=tuple(
            CoderFacts(layer=site.layer, kind=site.kind, name=names[site], width=coder.d_sae) for site, coder in coders.items()
        ),
        targets=targets.facts,
        num_active=tracer.num_latents,
        logit_error=float((frozen.capped(tracer.logits) - frozen.logits).abs().max()),
        version=version("everyscope"),
        settings=config.as_json(),
    )
    return assembled(facts, columns, kept)


def by_site(transcoders: Coders) -> tuple[dict[Site, str], dict[Site, Sae]]:
    """Names and coders by site, in the order in which the model computes them: transcoders, or else SAEs.

    ConfigError for two of one site, for both kinds together, for what does not say its site, or where there is none at all.
    """
    if isinstance(transcoders, Suite):
        transcoders = coders_of(transcoders)
    given = list(transcoders.values()) if isinstance(transcoders, Mapping) else list(transcoders)
    names, found = dict[Site, str](), dict[Site, Sae]()
    for one in given:
        coder = one.sae() if isinstance(one, SuiteEntry) else one
        writes = coder.metadata.target if coder.is_transcoder else coder.metadata.site
        if writes is None:
            raise ConfigError(f"{coder!r} does not say where it sits; give it metadata with its site, and a transcoder's target")
        site = Site("transcoder", writes.layer) if coder.is_transcoder else writes
        if site in found:
            raise ConfigError(f"two coders at {site}, {names[site]} and {coder!r}; choose one")
        names[site] = one.record.folder if isinstance(one, SuiteEntry) else repr(coder)
        found[site] = coder
    if not found:
        raise ConfigError("no transcoders given; give one for each layer, or a suite that has some")
    if len({coder.is_transcoder for coder in found.values()}) > 1:
        raise ConfigError("transcoders and SAEs together: give transcoders alone, for an exact graph, or SAEs alone")
    return names, {site: found[site] for site in sorted(found, key=lambda site: (site.layer, SITE_KINDS.index(site.kind)))}


def known_tokenizer(model: Any) -> Any:
    """The model's tokenizer, or None where it has no name to find one by."""
    return tokenizer_of(model) if getattr(model, "tokenizer", None) or getattr(model, "name_or_path", "") else None


def counted_tokens(model: nn.Module, input_ids: Int[Tensor, " ctx"]) -> Bool[Tensor, " ctx"]:
    """False at BOS, EOS and padding, where no SAE was trained."""
    return ~torch.isin(input_ids, torch.tensor(special_ids(model), dtype=input_ids.dtype, device=input_ids.device))


def columns_of(
    replacement: LocalReplacement | GradientTracer, targets: LogitTargets, coders: Sequence[Site]
) -> dict[str, np.ndarray]:
    """What all sources and then all targets are. `coders` are the sites of coders, which `coder` numbers."""
    context, layers, sites = replacement.frozen.context, replacement.frozen.num_layers, replacement.sites
    counts = [len(found.latent) for found in replacement.layers]
    places, number = np.arange(context), {site: place for place, site in enumerate(coders)}
    coder_of, layer_of = np.array([number.get(site, -1) for site in sites]), np.array([site.layer for site in sites])
    parts = {
        "kind": [np.full(sum(counts), LATENT), np.full(len(sites) * context, ERROR), np.full(context, TOKEN)],
        "layer": [np.repeat(layer_of, counts), np.repeat(layer_of, context), np.full(context, -1)],
        "position": [_joined([found.position for found in replacement.layers]), np.tile(places, len(sites)), places],
        "index": [
            _joined([found.latent for found in replacement.layers]),
            np.full(len(sites) * context, -1),
            replacement.frozen.input_ids[0].cpu().numpy(),
        ],
        "coder": [np.repeat(coder_of, counts), np.repeat(coder_of, context), np.full(context, -1)],
    }
    count = len(targets.facts)
    last = {
        "kind": np.full(count, LOGIT),
        "layer": np.full(count, layers),
        "position": np.full(count, context - 1),
        "index": np.array([one.token for one in targets.facts], np.int64),
        "coder": np.full(count, -1),
    }
    columns = {name: np.concatenate([*arrays, last[name]]).astype(np.int64) for name, arrays in parts.items()}
    activation, start = np.zeros(len(columns["kind"])), np.zeros(len(columns["kind"]))
    activation[: sum(counts)] = _joined([found.activation for found in replacement.layers])
    start[len(start) - count :] = targets.start
    return columns | {"activation": activation, "start": start}


def _joined(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy()


def assembled(facts: GraphFacts, columns: dict[str, np.ndarray], kept: Kept) -> Graph:
    """The graph of the latents whose rows are known, of all errors, tokens and targets; what other latents send goes to
    `rest`.
    """
    count = len(columns["kind"])
    known = dict[str, np.ndarray]()
    for name in ("pre", "bias", "rest", "rest_size", "violation"):
        known[name] = np.zeros(count)
        known[name][kept.node] = getattr(kept, name)
    nodes = columns["kind"] != LATENT
    nodes[kept.node] = True
    edges = kept.edges
    whole = Graph(facts, **columns, **known, edges=Edges(edges.source, edges.target, edges.weight.astype(np.float64)))
    graph = whole.part(Pruned(nodes, nodes[edges.source]))
    found = {"replacement": graph.scores.replacement, "completeness": graph.scores.completeness}
    found |= {"violation": graph.largest_violation}
    return replace(graph, facts=facts.model_copy(update=found))
