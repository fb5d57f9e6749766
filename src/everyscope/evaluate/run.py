"""Evaluate all trained SAEs of a model on its held-out documents.

One clean forward pass per batch feeds every SAE's sums; each SAE then costs one pass from its layer on, each site two more for
its ablations. SAEs whose scores are there are skipped, without loading the model; a killed evaluation goes on where it was
last saved.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from everyscope.base.errors import ShapeMismatch
from everyscope.base.files import PARTIAL
from everyscope.base.progress import meter, say
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.losses import LossSums
from everyscope.evaluate.passes import Evaluated, measure_batch
from everyscope.evaluate.pca import PcaSums, cached_pca
from everyscope.evaluate.scores import metrics_of, write_scores
from everyscope.evaluate.sums import EvaluationSums, SaeSums, SiteSums
from everyscope.evaluate.targets import Target, find_targets
from everyscope.sae.files import read_sae
from everyscope.sae.metrics import ReconstructionSums
from everyscope.shards.reader import Shards
from everyscope.sites.model import load_language_model
from everyscope.text.blocks import Block, read_blocks
from everyscope.text.tokenizer import load_tokenizer

PROGRESS_FILE = "progress.safetensors"
"""The saved sums of an unfinished evaluation, in the scores folder."""
PCA_FILE = "pca.safetensors"


@dataclass(frozen=True)
class EvaluateResult:
    """What an evaluation left on disk."""

    scores: Path
    """The scores folder: <site>/layer_<L>/<SAE>/metrics.json and latents.parquet."""
    num_evaluated: int
    """SAEs evaluated in this run."""
    num_skipped: int
    """SAEs whose scores were there already."""


def run(config: EvaluateConfig) -> EvaluateResult:
    """Score every SAE below `config.trained` that has no scores under this config yet.

    Raises DataError (nothing trained, no token to measure), ShapeMismatch and NonFinite (SAE, shards and model do not fit, or
    break down), ModelError and TextError (model or text cannot be read), StorageError.
    """
    targets = find_targets(config)
    pending = tuple(target for target in targets if not target.is_scored)
    progress = config.out / PROGRESS_FILE
    if pending:
        evaluated = _prepare(config, pending)
        sums = _start(evaluated)
        sums.restore(progress)
        _measure(config, evaluated, sums, progress)
        for target in pending:
            write_scores(target.scores, metrics_of(target, config, sums), sums.saes[target.identity].reconstruction)
    for leftover in (progress, progress.with_name(progress.name + PARTIAL)):
        leftover.unlink(missing_ok=True)
    return EvaluateResult(config.out, len(pending), len(targets) - len(pending))


def _prepare(config: EvaluateConfig, targets: tuple[Target, ...]) -> Evaluated:
    """Load SAEs, baselines and the model."""
    device = torch.device(config.model.device)
    saes, means, pcas = {}, {}, {}
    for target in targets:
        shards = Shards(config.shards / target.site.folder)
        sae, _ = read_sae(target.folder)
        if sae.d_in != shards.d_in:
            raise ShapeMismatch(f"{target.folder}: the SAE has d_in={sae.d_in}, its site's shards {shards.d_in}; train it again")
        saes[target.identity] = sae.to(device)
        if target.site not in pcas:
            means[target.site] = torch.as_tensor(shards.statistics.mean, dtype=torch.float64).to(device)
            pcas[target.site] = cached_pca(config.out / target.site.folder / PCA_FILE, shards, config.pca_rows)
    return Evaluated(load_language_model(config.model).model, targets, saes, means, pcas)


def _start(evaluated: Evaluated) -> EvaluationSums:
    """Empty sums for every site and SAE."""
    sites = {
        site: SiteSums(LossSums.start(), LossSums.start(), PcaSums.start(len(evaluated.means[site]))) for site in evaluated.sites
    }
    saes = {
        target.identity: SaeSums(
            ReconstructionSums.start(evaluated.means[target.site], evaluated.saes[target.identity].d_sae), LossSums.start()
        )
        for target in evaluated.targets
    }
    return EvaluationSums(LossSums.start(), sites, saes)


def _measure(config: EvaluateConfig, evaluated: Evaluated, sums: EvaluationSums, progress: Path) -> None:
    """Add all batches that are still to do, saving now and then."""
    tokenizer = load_tokenizer(config.model.name, config.model.revision)
    blocks = islice(read_blocks(config.text, tokenizer, "held_out"), sums.sequences, config.num_sequences)
    num_passes = ceil(config.num_sequences / config.batch_blocks) * evaluated.passes_per_batch
    device = torch.device(config.model.device)
    with meter("evaluate", num_passes, "passes") as progress_meter:
        if sums.batches:
            progress_meter.advance(sums.batches * evaluated.passes_per_batch, is_resumed=True)
        for input_ids, mask in _batches(blocks, config.batch_blocks):
            measure_batch(evaluated, sums, input_ids.to(device), mask.to(device), progress_meter.advance)
            if sums.batches % config.checkpoint_batches == 0:
                sums.save(progress)
    if sums.sequences < config.num_sequences:
        say(f"The held-out text ends after {sums.sequences} of {config.num_sequences} sequences; the scores are of those")


def _batches(blocks: Iterator[Block], size: int) -> Iterator[tuple[Int[Tensor, "batch ctx"], Bool[Tensor, "batch ctx"]]]:
    """Token ids (int64) and masks of `size` blocks at a time; the last batch may be smaller."""
    while batch := list(islice(blocks, size)):
        input_ids = torch.from_numpy(np.stack([block.input_ids for block in batch])).long()
        yield input_ids, torch.from_numpy(np.stack([block.mask for block in batch]))
