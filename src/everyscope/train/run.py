"""Training a group of SAEs, from shards to folded SAEs; resumes from the last checkpoint and skips finished SAEs.

A training group whose settings ask for several processes is trained by that many on this host. On several hosts, each of
the processes calls `run_rank`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from everyscope.activations.stream.addresses import opened as opened_source
from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.source import Source
from everyscope.base.errors import ConfigError, NonFinite
from everyscope.base.files import write_json
from everyscope.base.ids import content_id
from everyscope.base.logs import JsonLines
from everyscope.base.signals import EXIT_CODE, termination
from everyscope.sae.config import SaeConfig
from everyscope.sae.files import has_sae, read_record, write_sae
from everyscope.sae.mesh import ALONE, Collective, Mesh, of_all
from everyscope.sae.normalisation import Normalisation
from everyscope.sae.trainable import StepLosses
from everyscope.train.assembly import save_assembled
from everyscope.train.checkpoint import (
    Saver,
    find_checkpoint,
    folder_of_ranks,
    forget_checkpoint,
    load_checkpoint,
    opened,
    save_checkpoint,
)
from everyscope.train.config import TrainConfig, products_of, sae_name
from everyscope.train.feed import batches
from everyscope.train.launch import RankInfo, launch
from everyscope.train.metrics import losses_row
from everyscope.train.process_group import ProcessGroup, file_store
from everyscope.train.sinks import Sink, opened_sinks
from everyscope.train.spending import Spending
from everyscope.train.training_group import TargetSide, TrainingGroup, normalisation_for

Hook = Callable[[TrainingGroup, list[StepLosses]], None]
"""Called after every step; looks, never changes weights."""


TOLD_STEPS = 16
"""Progress is reported after so many steps, so that reports cost less than the work [steps]."""
STOP_STEPS = 8
"""Interval at which ranks agree whether one was asked to stop, for which they wait for their devices [steps]."""


def run(config: TrainConfig, progress: Callable[[int], None] = lambda steps: None) -> None:
    """Train every unfinished SAE of the training group; `progress` is called with steps. Idempotent, resumes to the same bits.

    In this process, or in as many as the settings ask for; these start again by themselves when one dies. SIGTERM saves a
    checkpoint and leaves with SystemExit. Raises DamagedData for shards that changed, ConfigError where the folder holds SAEs of
    another config, NonFinite where training diverges.
    """
    if config.settings.ranks > 1:
        launch(_as_rank, config, config.settings.ranks, progress)
    else:
        run_rank(config, ALONE, progress)


def run_counting_rows(config: TrainConfig, progress: Callable[[int], None]) -> None:
    """`run`, whose `progress` is called with rows, not after every step."""
    waiting = 0

    def count(steps: int) -> None:
        nonlocal waiting
        waiting += steps
        if waiting >= TOLD_STEPS:
            progress(waiting * config.settings.batch_rows)
            waiting = 0

    run(config, count)
    if waiting:
        progress(waiting * config.settings.batch_rows)


def run_rank(
    config: TrainConfig, collective: Collective, progress: Callable[[int], None] = lambda steps: None, device: str | None = None
) -> None:
    """This process's part of `run`, where `collective` joins it to the others; they share the folder `out`.

    `device` is this rank's own; None takes that of the settings. Raises what `run` does, and LostPeer.
    """
    with source_of(config, collective.mesh.rank) as source:
        train(config, source, progress, collective, device)


def _as_rank(config: TrainConfig, rank_info: RankInfo, progress: Callable[[int], None]) -> None:
    """`run_rank` as one of this host's processes; `progress` wants to know the steps done in all."""
    device, done = config.settings.device, 0
    if torch.device(device).type == "cuda":
        device = f"cuda:{rank_info.rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)

    def hear(steps: int) -> None:
        nonlocal done
        done += steps
        progress(done)

    mesh = Mesh(config.settings.latent_shards, config.settings.replicas, rank_info.rank)
    run_rank(config, ProcessGroup(mesh, file_store(rank_info.rendezvous, rank_info.ranks), device), hear, device)


def train(
    config: TrainConfig,
    source: Source | Aligned,
    progress: Callable[[int], None],
    collective: Collective = ALONE,
    device: str | None = None,
) -> None:
    """`run_rank` on a source that is open. Raises what that does."""
    run_id, leads, settings = run_id_of(config, source), collective.mesh.rank == 0, config.settings
    checkpoint = checkpoint_path(config)
    if any_of(collective, has_all_saes(config, source)):
        if leads:
            forget_checkpoint(checkpoint)  # a run killed between its last SAE and this line left it
        progress(config.steps)
        return
    group = _new_group(config, source, device or settings.device, collective)
    place = load_checkpoint(checkpoint, group, run_id)
    progress(place.num_steps_done)
    log = _opened_log(config, source, place.log_bytes) if leads else None
    saver = Saver(checkpoint, run_id)

    def report(group: TrainingGroup, losses: list[StepLosses]) -> None:
        if log is not None and (group.num_steps_done % settings.log_steps == 0 or group.num_steps_done == config.steps):
            log_losses(log, config, group.num_steps_done, losses, sinks)

    def keep(group: TrainingGroup, losses: list[StepLosses]) -> None:
        is_due = group.num_steps_done % settings.checkpoint_steps == 0 and group.num_steps_done < config.steps
        # Asked once: a signal between two questions would leave without saving.
        is_last_chance = _agree_to_stop(collective, group.num_steps_done, is_asked_to_stop)
        if is_due or is_last_chance:
            saver.save(group, log.num_bytes if log else 0)
        if is_last_chance:
            saver.wait()
            raise SystemExit(EXIT_CODE)

    reported, title = settings.report_to if leads else (), f"{config.coder_site} {config.group_id}"
    with (
        opened_sinks(reported, title, config.record(), config.out, place.num_steps_done) as sinks,
        termination() as is_asked_to_stop,
    ):
        with closing(saver):
            spent = fit(group, source, settings.batch_rows, [report, keep, lambda group, losses: progress(1)])
            saver.wait()
        if leads and spent.num_rows:
            write_json(speed_path(config), spent.as_json() | {"device": str(group.device), "precision": group.products})
        log_bytes = log.num_bytes if log else 0
        if log is not None:
            log.close()
        # Asked once more, all ranks alike: what came behind the last step's question would be forgotten with this block.
        is_stopping = any_of(collective, is_asked_to_stop())
        if is_stopping or collective.mesh.ranks > 1:
            save_checkpoint(checkpoint, group, run_id, log_bytes)
        if is_stopping:
            raise SystemExit(EXIT_CODE)
    if collective.mesh.ranks == 1:
        _save_alone(config, group, source)
    else:
        _save_together(config, source, group, collective)
    if leads:
        forget_checkpoint(checkpoint)


def _new_group(config: TrainConfig, source: Source | Aligned, device: str, collective: Collective) -> TrainingGroup:
    """The training group at its first step."""
    sources = sides_of(source)
    normalisation, *others = [normalisation_for(config.saes, side.statistics, config.max_norm) for side in sources]
    target = TargetSide(sources[1].d_in, others[0]) if others else None
    where = (device, config.settings.engine, collective, target, config.products)
    return TrainingGroup(config.saes, sources[0].d_in, normalisation, config.steps, *where)


def _save_alone(config: TrainConfig, group: TrainingGroup, source: Source | Aligned) -> None:
    """Write the finished SAEs, where this process holds all of them."""
    for sae, folded in zip(config.saes, group.folded(), strict=True):
        record = record_of(config, sae, source, group.normalisation, group.target_normalisation)
        write_sae(config.out / sae_name(sae), folded, record)


def _save_together(config: TrainConfig, source: Source | Aligned, group: TrainingGroup, collective: Collective) -> None:
    """Make the finished SAEs from the last checkpoint, each by one of the ranks."""
    checkpoint = find_checkpoint(checkpoint_path(config))
    assert checkpoint is not None, "saved a moment ago"
    with opened(checkpoint.files) as parts:
        for number, sae in enumerate(config.saes):
            if number % collective.mesh.ranks == collective.mesh.rank:
                sides = group.normalisation, group.target_normalisation
                record = record_of(config, sae, source, *sides)
                save_assembled(config.out / sae_name(sae), parts, number, sae, sides[0], record, sides[1])
    collective.barrier()


def _opened_log(config: TrainConfig, source: Source | Aligned, keep_bytes: int) -> JsonLines:
    """The training group's metrics, beside what it was asked for."""
    write_json(
        config.out / f"group_{config.group_id}.json", config.record() | {"parents": [side.identity for side in sides_of(source)]}
    )
    return JsonLines(config.out / f"group_{config.group_id}.metrics.jsonl", keep_bytes=keep_bytes)


def _agree_to_stop(collective: Collective, num_steps_done: int, is_asked_to_stop: Callable[[], bool]) -> bool:
    """Whether to stop here, all ranks alike: one that stopped a step before the others would leave them waiting."""
    if collective.mesh.ranks == 1:
        return is_asked_to_stop()
    return num_steps_done % STOP_STEPS == 0 and any_of(collective, is_asked_to_stop())


def any_of(collective: Collective, flag: bool) -> bool:
    """Whether it is true at any rank."""
    return bool(of_all(collective, torch.tensor(float(flag))).max() > 0)


def fit(group: TrainingGroup, source: Source | Aligned, batch_rows: int, hooks: list[Hook]) -> Spending:
    """Take the training group from where it stands to its last step. A batch is a function of the step, so resuming needs no
    more.
    """
    mesh, spent = group.collective.mesh, Spending()
    rows = batches(source, group.num_steps_done, group.steps, batch_rows, group.device, mesh.replica, mesh.replicas)
    for batch in spent.waiting(rows):
        with spent.on("steps"):
            losses = group.step(*batch)
        with spent.on("saving"):
            for hook in hooks:
                hook(group, losses)
        spent.num_rows += batch_rows
    return spent


def sides_of(source: Source | Aligned) -> tuple[Source, ...]:
    """The sources behind one of one site, or of several."""
    return source.sources if isinstance(source, Aligned) else (source,)


def run_id_of(config: TrainConfig, source: Source | Aligned) -> str:
    """An identity of a training group together with the activations that it is trained on."""
    return content_id([config.group_id, source.identity])


def checkpoint_path(config: TrainConfig) -> Path:
    """Where a training group in training keeps its state, or several ranks theirs beside it; gone when it is finished."""
    return config.out / f"group_{config.group_id}.safetensors"


def speed_path(config: TrainConfig) -> Path:
    """Where a training group's last run says how fast it was, and what took its time."""
    return config.out / f"group_{config.group_id}.speed.json"


def is_finished(config: TrainConfig) -> bool:
    """True where nothing is left for `run` to do; raises what `run` does for shards and SAEs that do not fit the config."""
    left = checkpoint_path(config)
    if left.exists() or folder_of_ranks(left).exists() or not all(has_sae(config.out / sae_name(sae)) for sae in config.saes):
        return False
    with source_of(config) as source:
        return has_all_saes(config, source)


@contextmanager
def source_of(config: TrainConfig, rank: int = 0) -> Iterator[Source | Aligned]:
    """The training group's activations; servers know it by training group, folder and rank, so that a resumed run takes its
    place.
    """
    journal = config.out / f"group_{config.group_id}.journal" if config.order == "any" else None
    folder = content_id(str(config.out.resolve()))
    sides = [(config.site, config.source or str(config.shards))]
    if config.writes is not None:
        sides.append((config.writes, config.target_source or str(config.target_shards)))
    with ExitStack() as stack:
        sources = []
        for site, place in sides:
            trainer = f"{site.folder}/{config.group_id}/{folder}" + (f"/{rank}" if rank else "")
            opened = opened_source(place, journal=journal, trainer=trainer, roots=config.tls_roots)
            sources.append(stack.enter_context(opened))
        yield sources[0] if len(sources) == 1 else Aligned(*sources)


def has_all_saes(config: TrainConfig, source: Source | Aligned) -> bool:
    """True where every SAE of the training group is on disk; ConfigError where one of that name comes from another run."""
    folders = {config.out / sae_name(sae): config.identity_of(sae, source.identity) for sae in config.saes}
    for folder, identity in folders.items():
        if has_sae(folder) and read_record(folder).get("run_id") != identity:
            raise ConfigError(
                f"{folder}: holds an SAE trained on other shards or with other settings than this one; "
                "delete the folder to train it again, or choose another --out"
            )
    return all(has_sae(folder) for folder in folders)


def log_losses(log: JsonLines, config: TrainConfig, step: int, losses: list[StepLosses], sinks: Sequence[Sink] = ()) -> None:
    """One line per SAE, in the log and in every sink. NonFinite where an SAE diverged."""
    for sae, loss in zip(config.saes, losses, strict=True):
        reconstruction = loss.reconstruction.item()
        if not math.isfinite(reconstruction):
            raise NonFinite(
                f"{config.coder_site}, {sae_name(sae)}: the loss is {reconstruction} at step {step}; lower the learning rate"
            )
        row = losses_row(sae, loss, step, config.steps, config.settings.batch_rows)
        for place in (log, *sinks):
            place.write(row)


def record_of(
    config: TrainConfig,
    sae: SaeConfig,
    source: Source | Aligned,
    normalisation: Normalisation,
    target: Normalisation | None = None,
) -> dict[str, Any]:
    """How an SAE came to be: everything that is needed to tell it from another, and to make it again.

    A transcoder also has the place that it `reads`, and the sizes of its `target`.
    """
    sides, settings = sides_of(source), config.settings
    transcoders: dict[str, Any] = {}
    if target is not None:
        limit = None if math.isinf(target.norm_limit) else target.norm_limit
        transcoders = {"reads": config.site.folder, "d_out": sides[1].d_in, "target_scale": target.scale}
        transcoders |= {"target_norm_limit": limit, "has_skip": sae.skip}
    return {
        "site": config.coder_site.kind,
        "layer": config.coder_site.layer,
        "d_in": sides[0].d_in,
        "width": sae.width,
        "scale": normalisation.scale,
        **transcoders,
        "max_norm": config.max_norm,
        "norm_limit": None if math.isinf(normalisation.norm_limit) else normalisation.norm_limit,
        "num_tokens": config.steps * config.settings.batch_rows,
        "steps": config.steps,
        "batch_rows": config.settings.batch_rows,
        "config": sae.as_json(),
        "precision": products_of(settings.device, settings.engine, settings.precision, has_skip=sae.skip),
        "parents": [side.identity for side in sides],
        "run_id": config.identity_of(sae, source.identity),
        "version": {"everyscope": version("everyscope"), "torch": torch.__version__},
    }
