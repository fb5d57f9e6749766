"""Our evaluation beside SAELens' own, on the same SAEs, model and tokens: what agrees, and why the rest differs.

SAELens reads the published format of our SAEs and the same Hugging Face model, in an environment of its own (peers/launch.py).
Where the two conventions differ, ours is computed by theirs too, with our passes: then all must agree.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.launch import python_of
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging

from everyscope.base.bundled import model_location
from everyscope.base.files import read_json, write_json
from everyscope.base.progress import say
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.held_out import Batch, HeldOut, ranges_of, read_held_out
from everyscope.evaluate.losses import kl_divergence
from everyscope.evaluate.passes import clean_pass, spliced_logits
from everyscope.evaluate.run import run
from everyscope.evaluate.targets import EvaluateTarget, load_targets
from everyscope.publish.formats import write_saelens
from everyscope.sae.files import read_record
from everyscope.sites.model import load_language_model

TOLERANCE = 1e-4
"""The largest difference that counts as agreement: in the metric's own unit, and relative where it is above 1."""
HOOKS = {"resid_post": "model.layers.{layer}", "mlp_out": "model.layers.{layer}.post_feedforward_layernorm"}
"""Where SAELens finds our sites in a Gemma-2 model: it sees modules' outputs, so not attn_out, which is an input."""
SAME = {
    "explained_variance": "1 - fvu, both over the whole data set",
    "l0": "the same rows, the same rule",
    "mse": "mean over tokens of the squared distance",
    "cossim": "mean cosine",
    "l2_ratio": "mean ratio of norms",
}
"""Metrics that mean the same in both."""
CONVENTIONS = {
    "ce_loss_without_sae": "SAELens counts predictions of masked tokens (EOS) too; a position counts here if both are unmasked",
    "ce_loss_with_sae": "as above",
    "ce_loss_with_ablation": "as above; and SAELens zeroes masked positions too, so that BOS is lost, which is kept here",
    "kl_div_with_sae": "as above; SAELens counts the last position of a block, which predicts nothing, as well",
}
"""Metrics that differ by convention, and in what."""


def main() -> None:
    """Compare some SAEs of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, as runs/tiny")
    parser.add_argument("--blocks", type=int, default=32, help="held-out blocks [blocks]")
    parser.add_argument("--batch", type=int, default=4, help="blocks per forward pass [blocks]")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache")
    parser.add_argument("--out", type=Path, default=None, help="results.json; printed only, if not given")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(options.run, options.blocks, options.batch, options.cache, Path(folder))
    if options.out:
        write_json(options.out, found)
    show(found)


def compare(folder: Path, blocks: int, batch: int, cache: Path, work: Path) -> dict[str, Any]:
    """All numbers of both, by SAE and metric."""
    recipe = read_json(folder / "recipe.json")
    config = EvaluateConfig(
        model=recipe["model"],
        text=recipe["text"],
        shards=folder / "shards",
        trained=folder / "train",
        out=work / "scores",
        num_sequences=blocks,
        batch_blocks=batch,
        baseline_sequences=blocks,
        uniformity_sequences=0,
    )
    targets = chosen(load_targets(config))
    config = config.model_copy(update={"saes": tuple(target.place for target in targets)})
    run(config)
    held_out = read_held_out(config)
    assert held_out.num_sequences % batch == 0, f"{held_out.num_sequences} blocks do not fill batches of {batch}"
    theirs = ask_saelens(config, held_out, targets, cache, work)
    model = load_language_model(config.model).model
    rows = []
    for target in targets:
        ours = read_json(config.out / target.place / "metrics.json")
        same = {"l0": ours["l0"], "mse": ours["mse"], "cossim": ours["cosine"], "l2_ratio": ours["l2_ratio"]}
        native = {"ce_loss_without_sae": ours["loss_clean"], "ce_loss_with_sae": ours["loss_spliced"]}
        native |= {"ce_loss_with_ablation": ours["loss_zero_ablated"], "kl_div_with_sae": ours["kl"]}
        by_theirs = by_their_conventions(model, target, held_out, batch)
        for name in (*SAME, *CONVENTIONS):
            mine = {"explained_variance": 1 - ours["fvu"], **same, **native}[name]
            value = theirs["metrics"][target.place][name]
            compared = by_theirs.get(name, mine)
            rows.append(
                {
                    "sae": target.place,
                    "metric": name,
                    "saelens": value,
                    "everyscope": mine,
                    "everyscope_by_their_convention": compared,
                }
            )
    return {
        "command": f"python benchmarks/agreement.py RUN --blocks {blocks} --batch {batch}",
        "versions": theirs["versions"],
        "model": config.model.name,
        "blocks": held_out.num_sequences,
        "context": held_out.context,
        "tokens": int(held_out.mask.sum()),
        "tolerance": TOLERANCE,
        "conventions": CONVENTIONS,
        "largest_difference": max(difference(row) for row in rows),
        "rows": rows,
    }


def difference(row: dict[str, Any]) -> float:
    """Of SAELens' number to ours by its convention, as TOLERANCE has it."""
    value = row["everyscope_by_their_convention"]
    return abs(row["saelens"] - value) / max(1.0, abs(value))


def chosen(targets: list[EvaluateTarget]) -> list[EvaluateTarget]:
    """The first SAE of the first, and of the last layer of each kind of site that SAELens can hook."""
    found = []
    for kind in HOOKS:
        of_kind = [target for target in targets if target.site.kind == kind]
        found += [next(target for target in of_kind if target.site == edge.site) for edge in (of_kind[0], of_kind[-1])]
    return found


def ask_saelens(
    config: EvaluateConfig, held_out: HeldOut, targets: list[EvaluateTarget], cache: Path, work: Path
) -> dict[str, Any]:
    """What SAELens' evaluator says, by SAE."""
    np.save(work / "tokens.npy", held_out.input_ids)
    saes = {}
    for target in targets:
        folder = work / "saelens" / target.place
        write_saelens(folder, target.sae(), target.site, config.model.name, read_record(target.folder), {})
        saes[target.place] = {"folder": str(folder), "hook": HOOKS[target.site.kind].format(layer=target.site.layer)}
    request = {
        "model": model_location(config.model.name),
        "tokens": str(work / "tokens.npy"),
        "batch": config.batch_blocks,
        "saes": saes,
    }
    say("  SAELens evaluates")
    finished = subprocess.run(
        [str(python_of("saelens", cache)), "-m", "peers.saelens_evaluator", json.dumps(request)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
    )
    return json.loads(finished.stdout.strip().splitlines()[-1])


@torch.no_grad()
def by_their_conventions(model: Any, target: EvaluateTarget, held_out: HeldOut, size: int) -> dict[str, float]:
    """Losses and divergence over every unmasked input token, whatever it predicts; zeros at all positions."""
    sae, sums, counts = target.sae(), dict.fromkeys(CONVENTIONS, 0.0), dict.fromkeys(CONVENTIONS, 0)
    ranges = ranges_of(held_out.num_sequences, (held_out.num_sequences, size))
    for batch in held_out.batches(ranges, torch.device("cpu")):
        clean = clean_pass(model, [target.site], batch)
        x = clean.activations[target.site]
        spliced = spliced_logits(model, batch.input_ids, target.site, sae(x[batch.mask]), batch.mask, clean.activations)
        everywhere = torch.ones_like(batch.mask)
        zeroed = spliced_logits(
            model, batch.input_ids, target.site, torch.zeros_like(x).flatten(0, 1), everywhere, clean.activations
        )
        values = {
            "ce_loss_without_sae": losses(clean.logits, batch),
            "ce_loss_with_sae": losses(spliced, batch),
            "ce_loss_with_ablation": losses(zeroed, batch),
            "kl_div_with_sae": kl_divergence(clean.logits.log_softmax(-1), spliced.log_softmax(-1))[batch.mask],
        }
        for name, value in values.items():
            sums[name] += float(value.sum(dtype=torch.float64))
            counts[name] += len(value)
    return {name: sums[name] / counts[name] for name in CONVENTIONS}


def losses(logits: Tensor, batch: Batch) -> Tensor:
    """The loss at every unmasked token that has a next one, in a row."""
    every = cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    return every[batch.mask[:, :-1].flatten()]


def show(found: dict[str, Any]) -> None:
    """A table for the terminal, and whether all agrees."""
    table = Table(title=f"{found['tokens']:,} tokens of {found['model']}; sae-lens {found['versions']['sae-lens']}")
    for name in ("metric", "SAELens", "everyscope", "same rule", "difference"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in found["rows"]:
        if row["metric"] == next(iter(SAME)):
            table.add_section()
            table.add_row(f"[bold]{row['sae']}")
        values = [row[name] for name in ("saelens", "everyscope", "everyscope_by_their_convention")]
        table.add_row(row["metric"], *(f"{value:.6f}" for value in values), f"{difference(row):.1e}")
    Console().print(table)
    largest = found["largest_difference"]
    say(f"Largest difference {largest:.1e}: {'all agree' if largest <= TOLERANCE else 'they do not agree'} to {TOLERANCE}")


if __name__ == "__main__":
    main()
