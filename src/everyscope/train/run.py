"""Training a bank, from shards to folded SAEs; goes on from the last checkpoint and skips what is done."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from everyscope.base.errors import ConfigError, NonFinite
from everyscope.base.files import write_json
from everyscope.base.ids import content_id
from everyscope.base.logs import JsonLines
from everyscope.base.signals import EXIT_CODE, termination
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import has_sae, read_record, save_sae
from everyscope.sae.schedules import learning_rate_share, sparsity_coefficient
from everyscope.sae.trainable import StepLosses, fold
from everyscope.stream.places import opened
from everyscope.stream.source import Source
from everyscope.train.bank import Bank
from everyscope.train.checkpoint import load_checkpoint, save_checkpoint
from everyscope.train.config import TrainConfig, sae_name
from everyscope.train.feed import batches

Hook = Callable[[Bank, list[StepLosses]], None]
"""Called after every step; looks, never changes weights."""


def run(config: TrainConfig, progress: Callable[[int], None] = lambda steps: None) -> None:
    """Train every SAE of the bank that is not finished; `progress` hears of steps done. Idempotent, resumes to the same bits.

    SIGTERM saves a checkpoint and leaves with SystemExit. Raises DamagedData for shards that changed, ConfigError where the
    folder holds SAEs of another config, NonFinite where training diverges.
    """
    with source_of(config) as source:
        train(config, source, progress)


def train(config: TrainConfig, source: Source, progress: Callable[[int], None]) -> None:
    """`run` on a source that is open. Raises what `run` does."""
    run_id = run_id_of(config, source)
    checkpoint = checkpoint_path(config)
    if has_all_saes(config, run_id):
        checkpoint.unlink(missing_ok=True)  # a run killed between its last SAE and this line left it
        progress(config.steps)
        return
    write_json(config.out / f"bank_{config.bank_id}.json", config.record() | {"parents": [source.identity]})
    bank = Bank(config.saes, source.d_in, source.scale, config.steps, config.settings.device, config.settings.engine)
    place = load_checkpoint(checkpoint, bank, run_id)
    progress(place.num_steps_done)
    log = JsonLines(config.out / f"bank_{config.bank_id}.metrics.jsonl", keep_bytes=place.log_bytes)

    def report(bank: Bank, losses: list[StepLosses]) -> None:
        if bank.num_steps_done % config.settings.log_steps == 0 or bank.num_steps_done == config.steps:
            log_losses(log, config, bank.num_steps_done, losses)

    def keep(bank: Bank, losses: list[StepLosses]) -> None:
        is_due = bank.num_steps_done % config.settings.checkpoint_steps == 0 and bank.num_steps_done < config.steps
        is_last_chance = is_asked_to_stop()  # asked once: a signal between two questions would leave without saving
        if is_due or is_last_chance:
            save_checkpoint(checkpoint, bank, run_id, log.num_bytes)
        if is_last_chance:
            raise SystemExit(EXIT_CODE)

    with termination() as is_asked_to_stop:
        fit(bank, source, config.settings.batch_rows, [report, keep, lambda bank, losses: progress(1)])
    log.close()
    for sae in bank.saes:
        save_sae(config.out / sae_name(sae.config), fold(sae, bank.scale), record_of(config, sae.config, source, run_id))
    checkpoint.unlink(missing_ok=True)


def fit(bank: Bank, source: Source, batch_rows: int, hooks: list[Hook]) -> None:
    """Take the bank from where it stands to its last step. A batch is a function of the step, so resuming needs no more."""
    for batch in batches(source, bank.num_steps_done, bank.steps, batch_rows, bank.device):
        losses = bank.step(batch)
        for hook in hooks:
            hook(bank, losses)


def run_id_of(config: TrainConfig, source: Source) -> str:
    """An identity of a bank together with the activations that it is trained on."""
    return content_id([config.bank_id, source.identity])


def checkpoint_path(config: TrainConfig) -> Path:
    """Where a bank in training keeps its state; gone when it is finished."""
    return config.out / f"bank_{config.bank_id}.safetensors"


def is_finished(config: TrainConfig) -> bool:
    """True where nothing is left for `run` to do; raises what `run` does for shards and SAEs that do not fit the config."""
    if checkpoint_path(config).exists() or not all(has_sae(config.out / sae_name(sae)) for sae in config.saes):
        return False
    with source_of(config) as source:
        return has_all_saes(config, run_id_of(config, source))


def source_of(config: TrainConfig) -> AbstractContextManager[Source]:
    """The bank's activations; servers know it by its bank and its folder, so that whoever resumes it takes its place."""
    journal = config.out / f"bank_{config.bank_id}.journal" if config.order == "any" else None
    place, folder = config.source or str(config.shards), content_id(str(config.out.resolve()))
    return opened(place, journal=journal, trainer=f"{config.site.folder}/{config.bank_id}/{folder}", roots=config.tls_roots)


def has_all_saes(config: TrainConfig, run_id: str) -> bool:
    """True where every SAE of the bank is on disk; ConfigError where one of that name comes from another run."""
    folders = [config.out / sae_name(sae) for sae in config.saes]
    for folder in folders:
        if has_sae(folder) and read_record(folder)["run_id"] != run_id:
            raise ConfigError(
                f"{folder}: holds an SAE trained on other shards or with another recipe than this one; "
                "delete the folder to train anew, or choose another --out"
            )
    return all(has_sae(folder) for folder in folders)


def log_losses(log: JsonLines, config: TrainConfig, step: int, losses: list[StepLosses]) -> None:
    """One line per SAE: the step's losses and the schedules in force. NonFinite where an SAE diverged."""
    for sae, loss in zip(config.saes, losses, strict=True):
        reconstruction = loss.reconstruction.item()
        if not math.isfinite(reconstruction):
            raise NonFinite(
                f"{config.site}, {sae_name(sae)}: the loss is {reconstruction} at step {step}; lower the learning rate"
            )
        log.write(
            {
                "step": step,
                "sae": sae_name(sae),
                "tokens": step * config.settings.batch_rows,
                "reconstruction_loss": reconstruction,
                "l0": loss.l0.item(),
                "sparsity_coefficient": sparsity_coefficient(sae, step - 1),
                "target_l0": sae.target_l0,
                "learning_rate": sae.recipe.learning_rate * learning_rate_share(sae.recipe, step - 1, config.steps),
            }
        )


def record_of(config: TrainConfig, sae: SaeConfig, source: Source, run_id: str) -> dict[str, Any]:
    """How an SAE came to be: everything that is needed to tell it from another, and to make it again."""
    return {
        "site": config.site.kind,
        "layer": config.site.layer,
        "d_in": source.d_in,
        "width": sae.width,
        "scale": source.scale,
        "num_tokens": config.steps * config.settings.batch_rows,
        "steps": config.steps,
        "batch_rows": config.settings.batch_rows,
        "config": sae.as_json(),
        "parents": [source.identity],
        "run_id": run_id,
        "version": {"everyscope": version("everyscope"), "torch": torch.__version__},
    }
