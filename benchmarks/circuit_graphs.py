"""What attribution graphs cost, and whether removing latents does what they predict.

    python benchmarks/circuit_graphs.py effects runs/tiny/suite
    python benchmarks/circuit_graphs.py cost runs/tiny/suite --tokens 22 512 4096
    python benchmarks/circuit_graphs.py cost HuggingFaceTB/SmolLM2-135M --width 4096 --l0 64 --tokens 64

`effects` removes 250 latents of each prompt one by one, in the model as it is and with attention patterns, norms or both held as
in the graph. `cost` takes a suite with its own transcoders, or a model with random transcoders of every layer whose thresholds
let L0 latents through; it prints wall and CPU seconds of the graph alone and the peak memory of the process.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everyscope.circuits.attribution import Coders, attribute
from everyscope.circuits.choosing import coders_of
from everyscope.circuits.config import AttributionConfig, Contrast
from everyscope.circuits.validation import spearman, validate
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capturing
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import LanguageModel, load_language_model
from everyscope.sites.names import Site
from everyscope.sites.registry import adapter_of
from everyscope.suite.reader import load_suite, model_of

PROMPTS = (
    ("def __init__(self, name, value):\n        self.name = name\n        self.value =", None),
    ("def __init__(self, name, value):\n        self.name = name\n        self.value =", Contrast(" value", " name")),
    ("import os\nimport sys\n\npath = os.", None),
    ("import os\nimport sys\n\npath = os.", Contrast("path", "name")),
    ("def first(items):\n    return items[", None),
    ("for index in range(len(", None),
)
"""Of Python, for `tiny`, with a target where it is not the likeliest tokens."""
HELD = {
    "nothing": {},
    "attention": {"freezes_attention": True},
    "norms": {"freezes_norms": True},
    "both": {"freezes_attention": True, "freezes_norms": True},
}


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["effects", "cost"])
    parser.add_argument("of", help="a suite's folder; for cost also a model, as a folder or hub id")
    parser.add_argument("--num-latents", type=int, default=250, help="removed one by one")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="of the prompts, BOS included")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--l0", type=int, default=64)
    parser.add_argument("--max-latents", type=int, default=2048)
    options = parser.parse_args()
    is_suite = (Path(options.of) / "suite.json").is_file()
    if is_suite:
        suite = load_suite(options.of)
        known = model_of(suite.root, suite.index.model).model_copy(update={"dtype": "float32"})
        model, coders = load_language_model(known), coders_of(suite)
    else:
        model, coders = load_language_model(ModelConfig(name=options.of)), None
    if options.what == "effects":
        assert coders is not None, "effects are measured on a suite's own transcoders"
        found: Any = [effects(model, coders, prompt, target, options.num_latents) for prompt, target in PROMPTS]
    else:
        found = [cost(model, coders, tokens, options) for tokens in options.tokens]
    command = f"python benchmarks/circuit_graphs.py {options.what} ..."
    print(json.dumps({"command": command, "device": platform.processor(), "found": found}, indent=2))


def effects(model: LanguageModel, coders: Coders, prompt: str, target: Any, num_latents: int) -> dict[str, Any]:
    """Spearman's correlations over latents of one prompt: of influence and size of effect, of signed prediction and effect."""
    graph = attribute(model, coders, prompt, target=target)
    rows = {}
    for name, held in HELD.items():
        tested = validate(model, coders, graph, num_latents=num_latents, **held)
        predicted, measured = tested.predicted[:, 0], tested.measured[:, 0]
        rows[name] = {
            "influence_and_size": round(tested.rank_correlation, 3),
            "predicted_and_measured": round(tested.prediction_correlation, 3),
            "their_sizes": round(spearman(np.abs(predicted), np.abs(measured)), 3),
            "same_sign_of_the_50_largest": float(np.mean((predicted * measured > 0)[np.argsort(-np.abs(predicted))[:50]])),
        }
    targets = [target.text for target in graph.facts.targets]
    return {"prompt": prompt, "targets": targets, "latents": num_latents, "replacement": graph.facts.replacement, "held": rows}


def cost(model: LanguageModel, coders: Coders | None, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """One graph of a prompt of random tokens, after one of eight tokens that warms up."""
    network: Any = model.model
    random = torch.Generator().manual_seed(0)
    bos = network.config.get_text_config().bos_token_id or 0
    ids = torch.randint(10, network.config.get_text_config().vocab_size - 10, (1, tokens), generator=random)
    ids[:, 0] = bos
    chosen = coders or random_transcoders(network, ids[:, :64], options.width, options.l0)
    attribute(model, chosen, ids[:, :8])
    loaded = peak_gib()
    wall, cpu = time.perf_counter(), time.process_time()
    graph = attribute(model, chosen, ids, config=AttributionConfig(max_latents=options.max_latents))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "tokens": tokens,
        "active_latents": graph.facts.num_active,
        "latents_computed": int((graph.kind == 0).sum()),
        "edges": len(graph.edges.source),
        "violation": graph.largest_violation,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "peak_gib": round(peak_gib(), 2),
        "peak_gib_before": round(loaded, 2),
    }


def peak_gib() -> float:
    """The most memory that this process has had [GiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def random_transcoders(network: torch.nn.Module, ids: torch.Tensor, width: int, l0: int) -> list[Sae]:
    """One of each layer, with directions at random and the threshold that lets `l0` latents through on these tokens."""
    adapter, made = adapter_of(network), []
    sites = [Site("mlp_in", layer) for layer in range(adapter.num_layers)]
    with capturing(network, sites) as seen:
        network(input_ids=ids, use_cache=False)
    for site in sites:
        random, d_model = torch.Generator().manual_seed(site.layer), adapter.d_model
        w_enc, w_dec = (torch.randn(shape, generator=random) / d_model**0.5 for shape in ((d_model, width), (width, d_model)))
        pre = (seen[site][0, 1:].float() @ w_enc).flatten()
        threshold = pre.kthvalue(int(len(pre) * (1 - l0 / width))).values
        metadata = SaeMetadata(site=site, target=Site("mlp_out", site.layer), convention="mlp_input")
        zeros = torch.zeros(width)
        made.append(Sae(w_enc, 0.1 * w_dec, zeros, torch.zeros(d_model), zeros + threshold.clamp(min=0), metadata=metadata))
    return made


if __name__ == "__main__":
    main()
