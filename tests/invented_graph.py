"""A graph of invented numbers that keeps its sums, with tokens that mean harm."""

import numpy as np

from everyscope.circuits.graph import ERROR, LATENT, LOGIT, TOKEN, CoderFacts, Graph, GraphFacts, TargetFacts
from everyscope.circuits.influence import Edges

SCRIPT = "<script>alert('x')</script>"
TOKENS = ("<bos>", SCRIPT, '"><img src=x onerror=alert(1)>', "\u202egnihtemos", " \x00\x1b[31m", "return", " value")


def invented_graph(coders: list[tuple[str, int]], violation: float = 1e-7, num_latents: int = 60, seed: int = 0) -> Graph:
    """One coder, a name and a width, for each layer; `violation` is that of one node."""
    random, layers, context = np.random.default_rng(seed), len(coders), len(TOKENS)
    of_layer = np.sort(random.integers(0, layers, num_latents))
    kind = np.repeat([LATENT, ERROR, TOKEN, LOGIT], [num_latents, layers * context, context, 2])
    layer = np.concatenate([of_layer, np.repeat(np.arange(layers), context), np.full(context, -1), np.full(2, layers)])
    places = np.arange(context)
    position = np.concatenate([random.integers(1, context, num_latents), np.tile(places, layers), places, [context - 1] * 2])
    widths = np.array([width for _, width in coders])
    index = np.concatenate([np.arange(num_latents) % widths[of_layer], np.full(layers * context, -1), places + 3, [3, 4]])
    count = len(kind)
    is_edge = (layer[:, None] > layer) & (position[:, None] >= position) & (random.random((count, count)) < 0.3)
    is_edge &= np.isin(kind, (LATENT, LOGIT))[:, None]
    target, source = is_edge.nonzero()
    weight = random.normal(size=len(source)) * random.random(len(source)) ** 3
    sent = np.bincount(target, weight, count)
    bias = np.where(np.isin(kind, (LATENT, LOGIT)), 0.25, 0.0)
    facts = GraphFacts(
        prompt="".join(TOKENS[1:]),
        tokens=TOKENS,
        token_ids=tuple(range(3, 3 + context)),
        model="tiny",
        num_layers=layers,
        method="replacement",
        coders=tuple(CoderFacts(layer=at, name=name, width=width) for at, (name, width) in enumerate(coders)),
        targets=(TargetFacts(token=3, text=SCRIPT, probability=0.7), TargetFacts(token=4, text=" value", probability=0.2)),
        replacement=0.61,
        completeness=0.8,
        violation=violation,
        num_active=200,
        logit_error=1e-6,
    )
    broken = np.zeros(count)
    broken[0] = violation
    return Graph(
        facts,
        kind,
        layer,
        position,
        index,
        coder=np.where(np.isin(kind, (LATENT, ERROR)), layer, -1),
        activation=np.where(kind == LATENT, random.gamma(2.0, 1.0, count), 0.0),
        start=np.where(kind == LOGIT, np.array([0.0] * (count - 2) + [0.7, 0.2]), 0.0),
        pre=sent + bias,
        bias=bias,
        rest=np.zeros(count),
        rest_size=np.zeros(count),
        violation=broken,
        edges=Edges(source, target, weight),
    )
