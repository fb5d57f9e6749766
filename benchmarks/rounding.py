"""What bfloat16 costs an SAE in quality: the same run in float32 and with the roundings of the bfloat16 GPU step, on a CPU.

    python benchmarks/rounding.py train.npy held.npy [--width 4096] [--l0 50] [--rows 60000] [--seeds 0 1 2] [--json]

Both files hold float32 activations [rows, d_in]. Every SAE is trained with the preset `fast` on the same batches. FVU is reported
at the L0 asked for: all thresholds are moved together until the held-out rows have it. A latent is dead that no held-out row
activates.

`rounded_update` is the slow twin of the step that precision="bfloat16" takes: the same formulas, plain, with each rounding where
the kernels round. tests/gpu holds the kernels to it.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from everyscope.activations.shards.norms import MAX_NORM
from everyscope.sae.config import SaeConfig
from everyscope.sae.functional import Gradients
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.objective import penalty
from everyscope.sae.presets import fast
from everyscope.sae.schedules import is_driven, sparsity_weight
from everyscope.sae.thresholds import drive_thresholds, warm_start
from everyscope.sae.trainable import StepLosses, TrainableSae, dense_update, move_along, new_sae

Update = Callable[[TrainableSae, Tensor, int, int], StepLosses]


def to_bfloat16(values: Tensor) -> Tensor:
    """The nearest bfloat16 numbers, in the type of `values`."""
    return values.bfloat16().to(values.dtype)


def rounded_gradients(
    sae: TrainableSae,
    x: Tensor,
    step: int,
    round_: Callable[[Tensor], Tensor] = to_bfloat16,
    is_dense: bool = False,
    target: Tensor | None = None,
) -> Gradients:
    """`functional.loss_gradients` with the roundings of the bfloat16 step; of its dense way, which rounds two arrays more."""
    p, rows, half, prefixes = sae.parameters, len(x), sae.config.preset.bandwidth / 2, sae.prefixes
    again = round_ if is_dense else lambda values: values
    centred, W_enc, W_dec = round_(sae.seen(x)), round_(p["W_enc"]), round_(p["W_dec"])
    pre = round_(centred @ W_enc) + p["b_enc"]
    active, near = (pre > p["threshold"]).to(x.dtype), ((pre - p["threshold"]).abs() < half).to(x.dtype)
    f, spans = again(pre * active), list(pairwise((0, *prefixes)))
    y, skip = x if target is None else target, p.get("w_skip")
    errors = [p["b_dec"] - (y if skip is None else y - centred @ round_(skip))]
    for start, stop in spans:
        errors.append(errors[-1] + f[:, start:stop] @ W_dec[start:stop])
    total, d_f, d_W_dec = torch.zeros_like(x), torch.empty_like(f), torch.empty_like(W_dec)
    for (start, stop), error in reversed(list(zip(spans, errors[1:], strict=True))):
        total = total + error * (2 / (rows * len(spans)))
        d_f[:, start:stop] = again(round_(total) @ W_dec[start:stop].T)
        d_W_dec[start:stop] = f[:, start:stop].T @ round_(total)
    d_pre, fired, num_pairs = d_f * active, active.sum(0), torch.maximum(active, near).sum() / rows
    d_b_enc = d_pre.sum(0)
    cost = penalty(sae.config, sparsity_weight(sae.config, step), fired / rows)
    return Gradients(
        W_enc=(d_pre.T @ centred).T,
        W_dec=d_W_dec,
        b_enc=d_b_enc,
        b_dec=total.sum(0) if sae.is_transcoder else total.sum(0) - p["W_enc"] @ d_b_enc,
        threshold=-(p["threshold"] * (d_f * near).sum(0) + near.sum(0) * cost / rows) / sae.config.preset.bandwidth,
        reconstruction_loss=errors[-1].square().sum() / rows,
        l0=fired.sum() / rows,
        fired=fired,
        pairs=num_pairs,
        w_skip=None if skip is None else centred.T @ round_(total),
    )


@torch.no_grad()
def rounded_update(sae: TrainableSae, x: Tensor, step: int, steps: int) -> StepLosses:
    """`dense_update` with the roundings of the bfloat16 step by pairs."""
    return move_along(sae, rounded_gradients(sae, x, step), step, steps)


UPDATES: dict[str, Update] = {"float32": dense_update, "bfloat16": rounded_update}


def normalisation_of(rows: np.ndarray) -> Normalisation:
    """As training on shards of these rows would have it, up to how the median is found."""
    norms = np.linalg.norm(rows, axis=1)
    usual = rows[norms <= MAX_NORM * np.median(norms)].astype(np.float64)
    mean = usual.mean(0)
    spread = float(np.sqrt(((usual - mean) ** 2).sum(1).mean()))
    largest = fast(rows.shape[1]).largest_row
    assert largest is not None
    return Normalisation(spread, mean, float(MAX_NORM * np.median(norms)), largest)


def trained(update: Update, config: SaeConfig, rows: np.ndarray, normalisation: Normalisation, batch: int) -> TrainableSae:
    """An SAE after one pass over `rows`, in batches of an order that its seed decides."""
    sae, steps = new_sae(config, rows.shape[1]), len(rows) // batch
    order = np.random.default_rng(config.seed).permutation(len(rows))
    for step in range(steps):
        x = normalisation(torch.from_numpy(rows[order[step * batch : (step + 1) * batch]]))
        if step == 0:
            warm_start(sae, x)
        losses = update(sae, x, step, steps)
        sae.last_fired.masked_fill_(losses.fired > 0, step + 1)
        if is_driven(config, step, steps):
            drive_thresholds(sae, losses, step + 1)
    return sae


@torch.no_grad()
def measured(sae: TrainableSae, x: Tensor, l0: float) -> dict[str, float]:
    """FVU and the share of dead latents of normalised rows at this L0, and the L0 as trained."""
    p = sae.parameters
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    excess = pre - p["threshold"]
    as_trained = float((excess > 0).sum()) / len(x)
    shift = float(excess.flatten().kthvalue(excess.numel() - round(l0 * len(x))).values)
    f = pre * (excess > shift)
    error = f @ p["W_dec"] + p["b_dec"] - x
    fvu = float(error.square().sum() / (x - x.mean(0)).square().sum())
    return {"fvu": fvu, "dead": float(((excess > shift).sum(0) == 0).float().mean()), "l0_as_trained": as_trained}


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--l0", type=float, default=50.0)
    parser.add_argument("--rows", type=int, default=60_000, help="rows of the training file that are used")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, held = (np.load(path, mmap_mode="r")[: options.rows] for path in (options.train, options.held))
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    normalisation = normalisation_of(rows)
    x = normalisation(torch.from_numpy(np.ascontiguousarray(held[:8192], dtype=np.float32)))
    results = []
    for seed in options.seeds:
        for precision, update in UPDATES.items():
            config = SaeConfig(width=options.width, target_l0=options.l0, seed=seed, preset=fast(rows.shape[1]))
            start = time.process_time()
            sae = trained(update, config, rows, normalisation, options.batch)
            result = {"seed": seed, "precision": precision} | measured(sae, x, options.l0)
            results.append(result | {"cpu_s": time.process_time() - start})
            if options.json:
                print(json.dumps(results[-1]), flush=True)
    if options.json:
        return
    table = Table("seed", "precision", "FVU", "dead", "L0 as trained", title=f"width {options.width}, FVU at L0 {options.l0:g}")
    for row in results:
        dead, fvu = f"{row['dead']:.2%}", f"{row['fvu']:.4f}"
        table.add_row(str(row["seed"]), str(row["precision"]), fvu, dead, f"{row['l0_as_trained']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
