"""Other projects' own loaders on files that we write: do they compute the same, and does circuit-tracer attribute with them?

    python benchmarks/interchange.py --out results.json

Transcoders of every layer of the bundled Gemma 2 and of a random Llama, with and without a skip, whose encoders are random and
whose decoders are least squares on activations: they are no good transcoders, but every tensor counts and no matrix is symmetric.
Each peer reads them in an environment of its own (peers/launch.py), and answers with its largest difference from us, relative to
the largest value. With --suite RUN/suite circuit-tracer alone is asked, about what `everyscope export --format circuit-tracer`
makes of the trained transcoders of a suite of `tiny`.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.launch import python_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from everyscope.base.bundled import model_location
from everyscope.base.files import read_json, write_json
from everyscope.base.progress import say
from everyscope.publish.circuit_tracer.config import CircuitTracerConfig
from everyscope.publish.circuit_tracer.run import run as export
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.inputs import tokenize
from everyscope.sites.model import LanguageModel, load_language_model
from everyscope.sites.names import Site
from everyscope.sites.norms import mlp_norm_of
from everyscope.suite.formats import circuit_tracer, dictionary_learning, gemma_scope_2, sparsify
from everyscope.suite.reader import load_sae

TOLERANCE = 1e-5
"""The largest relative difference that counts as agreement [1]."""
WIDTH, QUANTILE, RIDGE, K, ROWS = 512, 0.95, 1e-3, 20, 256
"""Latents of a transcoder, the quantile of its thresholds, the ridge of its decoder, latents of TopK, rows that are compared."""
PROMPT = "def add(first, second):\n    return first + second\n\n\nclass Point:\n    def __init__(self, x, y):\n        self.x = x"


def main() -> None:
    """Make coders, write them, ask every peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, default=None, help="a described suite with transcoders of every layer")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--work", type=Path, default=None, help="folder for what is written; a temporary one, if not given")
    parser.add_argument("--out", type=Path, default=None, help="results.json; printed only, if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = compare(options.suite, options.work or Path(temporary), options.cache)
    print(json.dumps(found, indent=2))
    if options.out:
        write_json(options.out, found)
    if found["largest_difference"] > TOLERANCE:
        raise SystemExit(f"they do not agree to {TOLERANCE}")


@dataclass(frozen=True)
class Activations:
    """What a model's MLPs read and write."""

    model: LanguageModel
    location: str
    """The model's folder."""
    rows: dict[Site, Tensor]
    """On some text, BOS left out [rows, d_model]."""
    input_ids: Tensor
    """Of the prompt [ctx]."""
    of_prompt: dict[Site, Tensor]
    """On the prompt [ctx, d_model]."""

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.model.adapter.num_layers


def compare(suite: Path | None, work: Path, cache: Path) -> dict[str, Any]:
    """What every peer says."""
    activations = captured(model_location("tiny"))
    trained = {skip: [transcoder(activations, layer, skip) for layer in range(activations.num_layers)] for skip in (False, True)}
    tracers: dict[str, Any] = {}
    if suite is None:
        llama = captured(small_llama(work / "llama"))
        sets: dict[str, tuple[Activations, list[Sae]]] = {
            "gemma_2_no_skip": (activations, [without_gain(activations.model, coder) for coder in trained[False]]),
            "gemma_2_skip": (activations, [without_gain(activations.model, coder) for coder in trained[True]]),
            "llama_skip": (llama, [transcoder(llama, layer, True) for layer in range(llama.num_layers)]),
        }
        for name, (of, coders) in sets.items():
            folder = work / f"set_{name}"
            circuit_tracer.write(folder, coders, model=of.location, output="hook_mlp_out", scan=str(folder.resolve()))
            tracers[name] = ask_tracer(of, coders, folder, work, cache)
    else:
        folder = work / "set_suite"
        export(CircuitTracerConfig(suite=suite, out=folder, input="normalised", model=activations.location))
        coders = [load_sae(path) for path in circuit_tracer.layer_files(folder)]
        tracers["suite"] = ask_tracer(activations, coders, folder, work, cache)
    found = {"circuit_tracer": tracers, **({} if suite else ask_readers(trained, activations, work, cache))}
    return {
        "command": "python benchmarks/interchange.py" + ("" if suite is None else f" --suite {suite}"),
        "models": "tiny (Gemma 2, 4 layers)" + (", its trained transcoders" if suite else ", and a random Llama of 3 layers"),
        "width": WIDTH,
        "rows": len(next(iter(activations.rows.values()))),
        "tolerance": TOLERANCE,
        "largest_difference": max(_numbers(found)),
        **found,
    }


def small_llama(folder: Path) -> str:
    """A random Llama with the bundled model's tokenizer and norms whose gains are not 1; its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # as they are: older transformers do not load what newer ones save
        shutil.copy(Path(model_location("tiny")) / name, folder)
    return str(folder.resolve())


@torch.no_grad()
def captured(location: str) -> Activations:
    """The activations of some Python, and of the prompt."""
    model = load_language_model(ModelConfig(name=location))
    sites = [Site(kind, layer) for layer in range(model.adapter.num_layers) for kind in ("mlp_in", "mlp_out")]
    context = model.adapter.config.max_position_embeddings
    tokens = tokenize(model, [Path(module).read_text()[:4000] for module in (argparse.__file__, tempfile.__file__)])
    mask = tokens.attention_mask.clone()
    mask[:, 0] = False
    parts = zip(tokens.input_ids.split(context, dim=1), mask.split(context, dim=1), strict=True)
    blocks = [{site: x[keep] for site, x in capture(model, sites, ids).items()} for ids, keep in parts]
    input_ids = tokenize(model, PROMPT).input_ids
    of_prompt = {site: x[0] for site, x in capture(model, sites, input_ids).items()}
    return Activations(
        model, location, {site: torch.cat([block[site] for block in blocks]) for site in sites}, input_ids[0], of_prompt
    )


def _numbers(found: dict[str, Any]) -> list[float]:
    """All differences in it."""
    of_tracer = [
        one[name] for one in found["circuit_tracer"].values() for name in ("latents", "outputs", "latents_through_its_hooks")
    ]
    others = [
        value for peer in found if peer != "circuit_tracer" for pair in found[peer]["differences"].values() for value in pair
    ]
    return of_tracer + others


def transcoder(activations: Activations, layer: int, skip: bool) -> Sae:
    """Random directions with thresholds at a quantile, and the least-squares decoder, bias and skip for them."""
    x, y = (activations.rows[Site(kind, layer)].double() for kind in ("mlp_in", "mlp_out"))
    generator = torch.Generator().manual_seed(layer)
    W_enc = torch.randn(x.shape[1], WIDTH, generator=generator, dtype=torch.float64) / x.norm(dim=1).mean()
    b_enc = 0.1 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    pre = x @ W_enc + b_enc
    threshold = pre.quantile(QUANTILE, dim=0).clamp(min=0.01)
    f = torch.where(pre > threshold, pre, 0)
    known = torch.cat([f, torch.ones(len(x), 1, dtype=x.dtype), *([x] if skip else [])], dim=1)
    size = known.square().mean(0).sum() * len(x)
    solution = torch.linalg.solve(
        known.T @ known + RIDGE * size / known.shape[1] * torch.eye(known.shape[1], dtype=x.dtype), known.T @ y
    )
    tensors = {"W_enc": W_enc, "W_dec": solution[:WIDTH], "b_enc": b_enc, "b_dec": solution[WIDTH], "threshold": threshold}
    tensors |= {"W_skip": solution[WIDTH + 1 :]} if skip else {}
    known_by = SaeMetadata(Site("mlp_in", layer), "tiny", target=Site("mlp_out", layer), convention="mlp_input")
    return Sae(**{name: tensor.float().contiguous() for name, tensor in tensors.items()}, metadata=known_by)


def without_gain(model: LanguageModel, coder: Sae) -> Sae:
    """The transcoder for the MLP's input without the norm's gain, which is what circuit-tracer finds in Gemma 2."""
    assert coder.metadata.site is not None
    norm = mlp_norm_of(model.adapter, coder.metadata.site.layer)
    return to_convention(coder, "normalised", norm.gain, norm.bias)


@torch.no_grad()
def ask_tracer(activations: Activations, coders: list[Sae], folder: Path, work: Path, cache: Path) -> dict[str, Any]:
    """circuit-tracer's differences on given activations and through its own hooks, and its attribution graph of the prompt."""

    def inputs(of: dict[Site, Tensor], layer: int) -> Tensor:
        x = of[Site("mlp_in", layer)]
        if coders[layer].metadata.convention == "mlp_input":
            return x
        norm = mlp_norm_of(activations.model.adapter, layer)
        return (x - norm.bias) / norm.gain

    given = [inputs(activations.rows, layer)[:ROWS] for layer in range(len(coders))]
    prompts = [inputs(activations.of_prompt, layer) for layer in range(len(coders))]
    path = work / f"{folder.name}.npz"
    np.savez(
        path,
        x=torch.stack(given).numpy(),
        f=torch.stack([coder.encode(x) for coder, x in zip(coders, given, strict=True)]).numpy(),
        y=torch.stack([coder(x) for coder, x in zip(coders, given, strict=True)]).numpy(),
        f_of_prompt=torch.stack([coder.encode(x) for coder, x in zip(coders, prompts, strict=True)]).numpy(),
        input_ids=activations.input_ids.numpy(),
    )
    say(f"  circuit-tracer reads {folder}")
    request = {"set": str(folder.resolve()), "model": activations.location, "arrays": str(path)}
    request |= {"graphs": str(work / "graphs"), "slug": folder.name}
    found = answer(python_of("circuit_tracer", cache), "tracer", request)
    kinds = Counter(node["feature_type"] for node in read_json(Path(found["graph"].pop("file")))["nodes"])
    return found | {"graph_file": dict(sorted(kinds.items()))}


def ask_readers(trained: dict[bool, list[Sae]], activations: Activations, work: Path, cache: Path) -> dict[str, Any]:
    """The differences of SAELens, sparsify and dictionary_learning, on coders written in their formats."""
    coders: dict[str, dict[str, tuple[Sae, Path]]] = {"saelens": {}, "sparsify": {}, "dictionary_learning": {}}
    for skip, (first, *_) in trained.items():
        name = "skip_transcoder" if skip else "transcoder"
        coders["saelens"][name] = first, work / f"saelens_{name}"
        first.save(coders["saelens"][name][1])
        folder = work / f"layer_0_width_{WIDTH}_l0_small{'_affine' if skip else ''}"
        gemma_scope_2.write(folder, with_model(first))
        coders["saelens"][f"gemma_scope_2_{name}"] = first, folder
        top = Sae(**first.own_tensors() | {"threshold": torch.zeros(WIDTH)}, metadata=first.metadata, top_k=K)
        coders["sparsify"][name] = top, work / f"sparsify_{name}/layers.0.mlp"
        sparsify.write(coders["sparsify"][name][1], top)
    for name, top_k in (("jumprelu", None), ("topk", K)):
        sae = as_sae(trained[False][1], top_k)
        for peer, write in (
            ("saelens", lambda one, path: one.save(path)),
            ("dictionary_learning", lambda one, path: dictionary_learning.write(path, one)),
        ):
            coders[peer][name] = sae, work / f"{peer}_{name}"
            write(sae, coders[peer][name][1])
    sae = as_sae(trained[False][1], K)
    coders["sparsify"]["topk"] = sae, work / "sparsify_sae/layers.1.mlp"
    sparsify.write(coders["sparsify"]["topk"][1], sae)
    return {peer: ask_reader(peer, its, activations, work, cache) for peer, its in coders.items()}


def ask_reader(
    peer: str, coders: dict[str, tuple[Sae, Path]], activations: Activations, work: Path, cache: Path
) -> dict[str, Any]:
    """One peer's differences."""
    arrays = {}
    for name, (coder, _) in coders.items():
        site = coder.metadata.site
        assert site is not None
        x = activations.rows[site][:ROWS]
        with torch.no_grad():
            arrays |= {f"{name}/x": x.numpy(), f"{name}/f": coder.encode(x).numpy(), f"{name}/y": coder(x).numpy()}
    path = work / f"{peer}.npz"
    np.savez(path, allow_pickle=False, **arrays)
    say(f"  {peer} reads {len(coders)} coders")
    request = {"arrays": str(path), "coders": {name: str(folder) for name, (_, folder) in coders.items()}}
    return answer(python_of(peer, cache), "readers", request, peer)


def with_model(coder: Sae) -> Sae:
    """The same with a model's name that Gemma Scope 2's readers know."""
    return coder.with_tensors(replace(coder.metadata, model="google/gemma-3-270m"))


def as_sae(coder: Sae, top_k: int | None) -> Sae:
    """An SAE of mlp_out with the transcoder's tensors: of equal sizes, they fit."""
    tensors = coder.own_tensors() | ({} if top_k is None else {"threshold": torch.zeros(WIDTH)})
    site = coder.metadata.target
    return Sae(**tensors, metadata=SaeMetadata(site, "tiny"), top_k=top_k)


def answer(python: Path, module: str, request: dict[str, Any], *before: str) -> dict[str, Any]:
    """What a peer's process prints last."""
    finished = subprocess.run(
        [str(python), "-m", f"peers.{module}", *before, json.dumps(request)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    if finished.returncode:
        raise SystemExit(f"peers.{module} failed: {finished.stderr.strip()[-3000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
