"""Into which jobs each stage of a recipe is divided, and what each takes of the machine that it runs on.

A harvest is divided by buckets, which are the same files wherever they are written; training by groups of SAEs; an evaluation, if
asked, by sites, labels by SAEs. Comparisons are a job each, description one: its SAEs share passes of the model and look at one
another.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.folder import HarvestFolder
from everyscope.activations.harvest.model_handle import model_identity
from everyscope.activations.harvest.run import run as harvest
from everyscope.base.errors import ConfigError
from everyscope.base.ids import content_id
from everyscope.describe.explanations.config import ExplainConfig
from everyscope.describe.explanations.run import run as explain
from everyscope.describe.explanations.run import run_share as explain_share
from everyscope.describe.explanations.targets import find_targets as explained
from everyscope.evaluate.comparisons import precision, probing, random_model, splitting, subsets, transfer, widths
from everyscope.evaluate.comparisons.config import (
    ComparisonConfig,
    PrecisionConfig,
    ProbingConfig,
    RandomModelConfig,
    SplittingConfig,
    SubsetsConfig,
    TransferConfig,
    WidthsConfig,
)
from everyscope.evaluate.config import EvaluateConfig
from everyscope.evaluate.cost import read_costs, write_costs
from everyscope.evaluate.run import blocks_left
from everyscope.evaluate.run import run as evaluate
from everyscope.evaluate.targets import EvaluateTarget, load_targets
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job, Progress, Resources
from everyscope.run.jobs.pool import default_workers, threads_of
from everyscope.run.placement import Devices, WidthOf, group_work
from everyscope.sites.model import quiet_transformers
from everyscope.suite.layout import METRICS_FILE
from everyscope.train.config import TrainConfig
from everyscope.train.memory import CONTEXT_BYTES, bytes_of
from everyscope.train.run import is_finished
from everyscope.train.run import run_counting_rows as train_group

COMPARISONS: dict[type, Callable[[Any], Path]] = {
    WidthsConfig: widths.run,
    SplittingConfig: splitting.run,
    SubsetsConfig: subsets.run,
    PrecisionConfig: precision.run,
    ProbingConfig: probing.run,
    TransferConfig: transfer.run,
    RandomModelConfig: random_model.run,
}
"""By its config, how each comparison is made."""
PARTS_FOLDER = "parts"
"""Below the scores, while an evaluation is divided."""
PROCESS_BYTES = 2**32
"""What a process holds besides the model that scores SAEs or labels latents: torch, the text, the firings of a group [bytes]."""
DIVIDED_BLOCKS, DIVIDED_LATENTS = 1024, 2048
"""Work that is worth the start of further processes [blocks], [latents]."""
GPU_JOB_CPUS = 4
"""Cores beside a whole GPU; a training group with a share of one takes the same share of them [cores]."""


def model_resources(device: str, engine: EngineConfig, workers: int = 1) -> Resources:
    """What one of `workers` jobs takes that run the language model; ConfigError for a device that a job cannot be given."""
    if not _is_gpu(device, engine):
        return Resources(cpus=engine.job_cpus or threads_of(workers))
    return Resources(cpus=engine.job_cpus or GPU_JOB_CPUS, gpus=float(engine.model_gpus))


def harvest_jobs(config: HarvestConfig, count: int, resources: Resources, name: str) -> list[Job]:
    """One job for each of `count` partitions, or fewer where there are fewer buckets; none where all are finished."""
    folder = HarvestFolder(config, {"model": model_identity(config.model)})
    folder.check_owner()
    folder.learn()
    if folder.is_finished() and not config.repair:
        return []
    folder.check_text()
    count = max(1, min(count, -(-config.num_tokens // config.bucket_rows)))
    return [
        Job(
            harvest,
            config.model_copy(update={"partition": (index, count)}),
            f"{name} {index + 1}/{count}",
            resources,
            units=-(-config.num_tokens // count),
        )
        for index in range(count)
    ]


def train_jobs(
    groups: Sequence[TrainConfig], d_in_of: WidthOf, engine: EngineConfig, devices: Devices | None = None
) -> list[Job]:
    """One job for each training group that is not finished; its memory is known where `devices` are."""
    pending = [group for group in groups if not is_finished(group)]
    workers = train_workers(groups, engine)
    names = [f"{group.coder_site} {group.group_id[:6]}" for group in pending]
    return [
        Job(
            train_group,
            group,
            name if names.count(name) == 1 else f"{group.out.parent.parent.parent.name} {name}",
            train_resources(group, d_in_of(group), workers, engine, devices),
            units=group.steps * group.settings.batch_rows,
            cost=group_work(group, d_in_of(group)),
        )
        for group, name in zip(pending, names, strict=True)
    ]


def train_workers(groups: Sequence[TrainConfig], engine: EngineConfig) -> int:
    """How many of a run's training groups train side by side on one host: none gets fewer cores than it has ranks."""
    most = max(group.settings.ranks for group in groups)
    return engine.workers or max(1, default_workers(len(groups), groups[0].settings.device) // most)


def train_resources(
    group: TrainConfig, d_in: int, workers: int, engine: EngineConfig, devices: Devices | None = None
) -> Resources:
    """What a training group takes. On a GPU a share by its memory, so that many small ones lie on one; several ranks one each.

    A group that does not fit is cut before it comes here (`run.placement.placed`).
    """
    num_bytes, ranks = bytes_of(group, d_in), group.settings.ranks
    if not _is_gpu(group.settings.device, engine):
        return Resources(cpus=max(engine.job_cpus or threads_of(workers), ranks), memory_bytes=num_bytes * ranks)
    if ranks > 1:
        return Resources(cpus=engine.job_cpus or GPU_JOB_CPUS * ranks, gpus=float(ranks))
    share = 1.0 if devices is None else (num_bytes + CONTEXT_BYTES) / (devices.usable_bytes + CONTEXT_BYTES)
    assert share <= 1, f"{group.site}: {num_bytes} bytes do not fit {devices}"
    if share > 0.5:  # two of them would not fit
        share = 1.0
    return Resources(cpus=engine.job_cpus or max(1, int(GPU_JOB_CPUS * share)), gpus=share)


def evaluation_jobs(config: EvaluateConfig, count: int, resources: Resources, name: str) -> list[Job]:
    """The SAEs that have no scores yet, divided by site into up to `count` jobs with a folder each; `gather_scores` ends them.

    With a count of 1 the job works in the scores folder itself. What goes together depends on what is pending alone, so that a
    killed part resumes.
    """
    if count == 1:
        return [Job(score, config, name, resources)]
    parts = _by_site([target for target in load_targets(config) if not target.is_scored], count)
    jobs = []
    for number, part in enumerate(parts):
        saes = tuple(target.place for target in part)
        share = config.model_copy(update={"saes": saes, "out": config.out / PARTS_FOLDER / content_id(saes)})
        title = f"{name} {number + 1}/{len(parts)}"
        jobs.append(Job(score_share, share, title, resources, units=blocks_left(share), cost=float(len(part))))
    return jobs


def evaluation_workers(config: EvaluateConfig, num_parameters: int, engine: EngineConfig) -> int:
    """Among how many jobs an evaluation is divided: one for each core, as far as sites go and the model fits. A small one is not.

    SAEs that have scores count too: sums depend on the number of threads, and a resumed run must come to the same bits.
    """
    targets = load_targets(config)
    sites = len({target.site for target in targets})
    if engine.evaluate_jobs is not None:
        return min(engine.evaluate_jobs, sites)
    is_large = len(targets) * config.num_sequences >= DIVIDED_BLOCKS
    return min(_fitting(config.model.device, num_parameters), sites) if is_large else 1


def score(config: EvaluateConfig) -> None:
    """An evaluation as a job: it has a bar of its own, in blocks, and tells nobody else of them."""
    evaluate(config)


def score_share(config: EvaluateConfig, progress: Progress) -> None:
    """One of several, which reports its blocks."""
    quiet_transformers()
    evaluate(config, _Told(progress))


@dataclass(frozen=True)
class _Told:
    """A count of blocks that goes to a job's `progress`."""

    progress: Progress

    def advance(self, amount: int, /, *, is_resumed: bool = False) -> None:
        """Whether this run has read them or one before."""
        self.progress(amount)


def gather_scores(scores: Path) -> None:
    """Move what parts of an evaluation have found of each site to its place, metrics.json last, and add up what it cost."""
    parts = scores / PARTS_FOLDER
    for part in sorted(parts.iterdir()) if parts.is_dir() else ():
        files = sorted(path for path in part.rglob("*") if path.is_file() and path.parent != part)
        for path in sorted(files, key=lambda path: path.name == METRICS_FILE):
            target = scores / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        entries = {f"{part.name} {key}": cost for key, cost in read_costs(part).items()}
        write_costs(scores, read_costs(scores) | entries)
        shutil.rmtree(part)
    shutil.rmtree(parts, ignore_errors=True)


def explanation_jobs(config: ExplainConfig, workers: int, resources: Resources) -> list[Job]:
    """The SAEs without labels, divided among `workers`; one job where a language model is asked, whose budget is one."""
    if config.endpoint is not None or workers == 1:
        return [Job(explain, config, "explain", resources)]
    jobs = []
    for number in range(workers):
        share = config.model_copy(update={"share": (number, workers)})
        units = sum(target.width for target in explained(share) if not target.is_explained)
        if units:  # even a single one goes to a process, which has its share of the threads
            jobs.append(Job(explain_share, share, f"explain {number + 1}/{workers}", resources, units=units))
    return jobs


def explanation_workers(config: ExplainConfig, num_parameters: int, engine: EngineConfig) -> int:
    """How many processes label latents side by side: one for each core, as far as the model fits; for few latents, one."""
    latents = sum(target.width for target in explained(config))
    return engine.workers or (_fitting(config.model.device, num_parameters) if latents >= DIVIDED_LATENTS else 1)


def _fitting(device: str, num_parameters: int) -> int:
    """Processes that hold the language model side by side: one for each core of a CPU, as far as memory goes."""
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return max(1, min(default_workers(os.cpu_count() or 1, device), int(room / (4 * num_parameters + PROCESS_BYTES))))


def comparison_jobs(configs: Sequence[ComparisonConfig], workers: int, resources: Resources) -> list[Job]:
    """One job a comparison; beside others it shows no progress of its own, and reports its end."""
    jobs = []
    for config in configs:
        work = COMPARISONS[type(config)]
        name = comparison_name(work)
        jobs.append(Job(work, config, name, resources) if workers == 1 else Job(compare, config, name, resources, units=1))
    return jobs


def compare(config: ComparisonConfig, progress: Progress) -> None:
    """One of several comparisons that are made side by side."""
    quiet_transformers()
    COMPARISONS[type(config)](config)
    progress(1)


def comparison_name(run: Callable[[Any], Path]) -> str:
    """What people call a comparison."""
    return f"compare {run.__module__.rpartition('.')[2].replace('_', ' ')}"


def _by_site(targets: Sequence[EvaluateTarget], count: int) -> list[list[EvaluateTarget]]:
    """Targets in up to `count` groups of about equal size, all of a site in one."""
    sites: dict[Any, list[EvaluateTarget]] = {}
    for target in targets:
        sites.setdefault(target.site, []).append(target)
    groups: list[list[EvaluateTarget]] = [[] for _ in range(min(count, len(sites)))]
    for members in sorted(sites.values(), key=len, reverse=True):
        min(groups, key=len).extend(members)
    return groups


def _is_gpu(device: str, engine: EngineConfig) -> bool:
    if device == "cpu":
        return False
    if engine.engine == "ray" and device != "cuda":
        raise ConfigError(f"device={device!r}: on a cluster a job sees only the GPUs that it is given; set device='cuda'")
    return True
