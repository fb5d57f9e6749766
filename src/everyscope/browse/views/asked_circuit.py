"""What pages ask of circuits: a graph of a prompt, and interventions on latents of one. Read from forms, answered as JSON."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.browse.live import MAX_TEXT, Ablation, AblationRequest, Asking, CircuitRequest
from everyscope.browse.pieces import Piece
from everyscope.browse.preparation import Preparation
from everyscope.browse.queries import Index, finite
from everyscope.browse.views.circuit import FOREIGN_EDGE_SHARE, FOREIGN_NODE_SHARE
from everyscope.browse.views.fields import Query, example, first
from everyscope.circuits.circuit_tracer import node_id
from everyscope.circuits.config import MAX_DIGITS, Contrast, Latent, Target, TargetTokens
from everyscope.circuits.files import ENDING, slug_of
from everyscope.circuits.graph import LATENT, Graph
from everyscope.suite.layout import INDEX_FILE

MAX_FACTOR = 1000.0
"""Of an ablated latent's activation, either way [1]."""
MAX_NAME = 80
"""Characters of a group's name that are kept [characters]."""
MAX_PINS = 1000
"""Nodes, and groups, that a download takes [nodes]."""
MAX_VARIANTS, MAX_EDITED = 40, 256
"""Of one ablation [variants, latents of all together]."""


def new_circuit_view(index: Index, query: Query, live: Asking, *, is_own: bool) -> dict[str, Any]:
    """The form for a new graph; `begins` where one of our own pages leads here with a prompt."""
    fields = {name: first(query, name)[:200] for name in ("position", "target", "against", "latent")}
    prompt = first(query, "prompt").replace("\r\n", "\n")[:MAX_TEXT]
    return {
        "prompt": prompt or example(index)[1],
        "fields": fields,
        "live": live,
        "begins": bool(prompt) and is_own and live.state != "absent",
    }


def circuit_request(query: Query) -> CircuitRequest:
    """What the form asks for; ConfigError for what cannot be read."""
    prompt, typed = first(query, "prompt").replace("\r\n", "\n"), first(query, "position").strip()
    if not prompt.strip() or len(prompt) > MAX_TEXT:
        raise ConfigError(f"the prompt has {len(prompt):,} characters; give 1 to {MAX_TEXT:,}, not all of them space")
    if typed and not (typed.isdecimal() and len(typed) <= MAX_DIGITS):
        raise ConfigError(f"position {typed[:40]!r}: expected the number of a token, BOS is 0")
    return CircuitRequest(prompt, int(typed) if typed else None, _target(query))


def _target(query: Query) -> Target:
    target, against, latent = (first(query, name) for name in ("target", "against", "latent"))
    if latent.strip():
        if target or against:
            raise ConfigError("a latent and next tokens: a graph explains one or the other; leave one field empty")
        return Latent.parse(latent.strip())
    if against:
        if not target:
            raise ConfigError(f"against {against[:40]!r}: give the token, too, whose logit is compared with it")
        return Contrast(target, against)
    return TargetTokens((target,)) if target else None


def drawn(preparation: Preparation, live: Asking, request: CircuitRequest) -> str:
    """The name of the graph that is asked for; it is made unless it lies there already, younger than the suite."""
    name = slug_of(request.prompt, f"page {request.position} {request.target!r}")
    found = preparation.graphs.get(name)
    if found is None or found.stat().st_mtime < (preparation.suite / INDEX_FILE).stat().st_mtime:
        live.draw(request, preparation.new_graphs / f"{name}{ENDING}")
    return name


def ablation_request(graph: Graph, query: Query) -> AblationRequest:
    """Each `variant` is a list of nodes, by id, with commas between; ConfigError for what are no latents of the graph."""
    known = {node_id(graph, int(node)): int(node) for node in (graph.kind == LATENT).nonzero()[0]}
    variants = [given.split(",") for given in query.get("variant", ())]
    if not variants or len(variants) > MAX_VARIANTS or sum(map(len, variants)) > MAX_EDITED:
        raise ConfigError(f"{len(variants)} variants: expected 1 to {MAX_VARIANTS}, with {MAX_EDITED} latents at most; pin fewer")
    unknown = next((one for some in variants for one in some if one not in known), None)
    if unknown is not None:
        raise ConfigError(f"{unknown[:60]!r} is no latent of this graph; pin latents that it has")
    latents = tuple(tuple(_latent(graph, known[one]) for one in some) for some in variants)
    factor = first(query, "factor") or "0"
    try:
        value = float(factor)
    except ValueError:
        value = float("nan")
    if not -MAX_FACTOR <= value <= MAX_FACTOR:
        raise ConfigError(f"factor {factor[:40]!r}: expected a number from {-MAX_FACTOR:g} to {MAX_FACTOR:g}")
    return AblationRequest(latents, value, bool(first(query, "attention")), bool(first(query, "norms")))


def _latent(graph: Graph, node: int) -> Latent:
    return Latent(int(graph.layer[node]), int(graph.position[node]), int(graph.index[node]))


def ablation_json(graph: Graph, request: AblationRequest, answers: Sequence[Ablation]) -> list[dict[str, Any]]:
    """For the script, one entry for each variant, None for numbers that overflowed. `latents` leaves out those that the variant
    itself scales.
    """
    found = []
    for edited, answer in zip(request.variants, answers, strict=True):
        latents = [row for row in answer.latents if _latent(graph, row[0]) not in edited]
        found.append(
            {
                "targets": [list(pair) for pair in answer.targets],
                "tokens": [[Piece(0, raw, False).plain, before, after] for raw, before, after in answer.tokens],
                "latents": [[node_id(graph, node), measured, predicted] for node, measured, predicted in latents],
            }
        )
    return finite(found)


def foreign_request(graph: Graph, query: Query) -> tuple[Graph, float, float]:
    """The graph with what the page has pinned and grouped, and the shares of nodes and edges of its sliders."""
    shares = [_share(query, name, default) for name, default in (("nodes", FOREIGN_NODE_SHARE), ("edges", FOREIGN_EDGE_SHARE))]
    pins = tuple(one for one in first(query, "pins").split(",")[:MAX_PINS] if one)
    groups = []
    for given in list(query.get("group", ()))[:MAX_PINS]:
        name, _, members = given.rpartition(":")
        groups.append((name[:MAX_NAME], *members.split(",")[:MAX_PINS]))
    facts = graph.facts.model_copy(update={"pins": pins, "groups": tuple(groups)} if pins or groups else {})
    return replace(graph, facts=facts), shares[0], shares[1]


def _share(query: Query, name: str, default: float) -> float:
    typed = first(query, name)
    try:
        value = float(typed) / 100 if typed else default
    except ValueError:
        value = float("nan")
    if not 0 < value <= 1:
        raise ConfigError(f"{name} {typed[:40]!r}: expected a percentage from 1 to 100")
    return value
