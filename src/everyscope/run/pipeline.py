"""All stages of a run, or one of them, in one folder: each skips what is finished and resumes what is not."""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everyscope.activations.harvest.live import LiveHarvest
from everyscope.activations.harvest.run import run as harvest
from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.live import LiveOrigin
from everyscope.activations.serve.run import serve
from everyscope.base.errors import ConfigError
from everyscope.base.files import make_folder, read_json, storage_errors, write_json
from everyscope.base.progress import heading, human_count, human_time, say
from everyscope.describe.run import run as describe
from everyscope.publish.run import PublishResult
from everyscope.publish.run import run as publish
from everyscope.run.activation_servers import served
from everyscope.run.checks import check, check_shape, found_devices
from everyscope.run.config import RunConfig
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.jobs.job import Job
from everyscope.run.jobs.runner import LocalRunner, Runner, opened_runner
from everyscope.run.jobs.schedule import Watch
from everyscope.run.model import with_shape
from everyscope.run.stage_jobs import (
    comparison_jobs,
    evaluation_jobs,
    evaluation_workers,
    explanation_jobs,
    explanation_workers,
    gather_scores,
    harvest_jobs,
    model_resources,
    train_jobs,
    train_workers,
)
from everyscope.run.stages import RECIPE_FILE, ModelPart, Stages, stages_of
from everyscope.sites.model import quiet_transformers
from everyscope.train.run import speed_path
from everyscope.train.spending import together

LOCK_FILE = ".lock"
JOBS_FOLDER = "jobs"
"""In a run's folder: locks and events of jobs that run in other processes."""


@dataclass(frozen=True)
class JobEngine:
    """Where a run's jobs run, as it was asked for, and what runs them."""

    settings: EngineConfig
    runner: Runner


THIS_HOST = JobEngine(EngineConfig(), LocalRunner())


@contextmanager
def opened_engine(settings: EngineConfig, out: Path, watches: Sequence[Watch] = ()) -> Iterator[JobEngine]:
    """The engine of `settings` for a run in `out`; `watches` receive events of jobs in other processes."""
    with opened_runner(settings, out / JOBS_FOLDER, watches) as runner:
        yield JobEngine(settings, runner)


@contextmanager
def run_folder(config: RunConfig, out: Path, is_shared: bool = False) -> Iterator[None]:
    """Hold `out` for this process and write the resolved recipe into it; ConfigError while another process holds it.

    Where it `is_shared`, processes that share it hold it together, and none of them writes the recipe. An error before any stage
    has written something takes the folder away again, if it was not there before.
    """
    quiet_transformers()
    is_new = not out.exists()
    make_folder(out)
    with storage_errors(out), (out / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: this folder is in use by another run; wait for it, or choose another --out") from None
        if not is_shared:
            write_json(out / RECIPE_FILE, config.as_json())
        try:
            yield
        except Exception:
            if is_new and {path.name for path in out.iterdir()} == {RECIPE_FILE, LOCK_FILE}:
                shutil.rmtree(out)
            raise


def run_harvest(stages: Stages, engine: JobEngine = THIS_HOST, partition: tuple[int, int] = (0, 1), repair: bool = False) -> None:
    """Text and model to shards, for the run and its controls; of several processes each writes a partition."""
    for part in stages.parts:
        name = _titled("harvest", part, stages)
        heading(name)
        config = part.harvest.model_copy(update={"partition": partition, "repair": repair})
        resources = model_resources(part.config.model.device, engine.settings)
        count = engine.runner.side_by_side(resources)
        if partition == (0, 1) and count > 1:
            engine.runner.run(harvest_jobs(config, count, resources, name), name, "tokens")
            config = config.model_copy(update={"repair": False})
        result = harvest(config)  # where jobs have done it, this loads nothing
        say(f"  {human_count(result.num_rows)} rows at each of {len(result.folders)} sites in {part.folder / 'shards'}")
        if not result.is_sealed:
            say("  other partitions are not finished; the last one to finish seals the folder")


def run_training(stages: Stages, engine: JobEngine = THIS_HOST) -> dict[str, Any]:
    """Shards to folded SAEs, one training group a job; from activation servers of the shards, if the engine's settings say so.

    The result is what the groups' last runs spent, as `Spending.as_json` gives it.
    """
    heading("train")
    groups = stages.groups
    jobs = train_jobs(groups, stages.d_in, engine.settings, stages.devices)
    if engine.settings.serve and stages.servers is None:
        jobs = served(jobs, engine.settings, stages.out / JOBS_FOLDER)
    workers = train_workers(groups, engine.settings) if isinstance(engine.runner, LocalRunner) else engine.settings.workers
    engine.runner.run(jobs, "training groups", "rows", workers)
    spent = together([read_json(path) for path in map(speed_path, groups) if path.is_file()])
    if spent["rows"]:
        shares = ", ".join(f"{share:.0%} {part}" for part, share in spent["shares"].items())
        say(f"  {human_count(spent['rows_per_second'])} rows/s in each process; time: {shares}")
    say(f"  {sum(len(group.saes) for group in groups)} SAEs in {len(groups)} training groups, in {stages.out / 'train'}")
    return spent


def serve_live(config: RunConfig, out: Path, serve_config: ServeConfig) -> None:
    """Serve what a harvest would write, made by the model as trainers ask for it, until SIGTERM; see `serve.run.run`.

    `out`/live keeps where buckets end and the scales. Trainers may work in `out` meanwhile: it is not held.
    """
    quiet_transformers()
    check_shape(config)
    harvest_config = config.harvest_config(out).model_copy(update={"out": out / "live"})
    serve(serve_config, LiveOrigin(LiveHarvest(harvest_config), serve_config))


def run_evaluation(stages: Stages, engine: JobEngine = THIS_HOST) -> None:
    """SAEs and held-out text to scores, then what is compared over the whole suite."""
    divided: list[tuple[str, int, list[Job]]] = []
    for part in stages.parts:
        workers = evaluation_workers(part.evaluate, part.config.sizes.num_parameters, engine.settings)
        resources, title = model_resources(part.config.model.device, engine.settings, workers), _titled("evaluate", part, stages)
        divided.append((title, workers, evaluation_jobs(part.evaluate, workers, resources, title)))
    if isinstance(engine.runner, LocalRunner):
        for title, workers, jobs in divided:
            run_divided(jobs, title, "blocks", workers, engine)
    else:
        run_titled([job for _, _, jobs in divided for job in jobs], "evaluate", engine)
    for part in stages.parts:
        gather_scores(part.evaluate.out)
    for name, reason in stages.config.slices_left_out.items():
        say(f"  compare {name}: left out; {reason}")
    workers = divided[0][1] if isinstance(engine.runner, LocalRunner) else 1
    resources = model_resources(stages.config.model.device, engine.settings, workers)
    jobs = comparison_jobs(stages.comparisons, workers, resources)
    if workers == 1:
        run_titled(jobs, "compare", engine)
    else:
        run_divided(jobs, "compare", "comparisons", workers, engine)


def run_titled(jobs: Sequence[Job], title: str, engine: JobEngine) -> None:
    """Run jobs that show their own progress: here one after another, each below its name; elsewhere together."""
    if not isinstance(engine.runner, LocalRunner):
        heading(title)
        engine.runner.run(jobs, title, workers=engine.settings.workers)
        return
    for job in jobs:
        heading(job.name)
        engine.runner.run([job], job.name)


def run_divided(jobs: Sequence[Job], title: str, unit: str, workers: int, engine: JobEngine) -> None:
    """Run the jobs of a stage: those that report units side by side below one title, one that shows its own progress here."""
    if any(job.units for job in jobs) or not jobs:
        heading(title)
        engine.runner.run(jobs, title.partition(" ")[0], unit, workers)
    else:
        run_titled(jobs, title, engine)


def run_description(stages: Stages, engine: JobEngine = THIS_HOST) -> None:
    """SAEs and text to the top activating examples and the logit effects of each latent."""
    resources = model_resources(stages.config.model.device, engine.settings)
    run_titled([Job(describe, stages.describe, "describe", resources)], "describe", engine)


def run_explanation(stages: Stages, engine: JobEngine = THIS_HOST) -> None:
    """Labels for every latent, learnt on training documents, scored on held-out ones."""
    workers = explanation_workers(stages.explain, stages.config.sizes.num_parameters, engine.settings)
    resources = model_resources(stages.config.model.device, engine.settings, workers)
    jobs = explanation_jobs(stages.explain, workers, resources)
    run_divided(jobs, "explain", "latents", workers, engine)


def run_publication(stages: Stages, *, by_bytes: bool = True) -> PublishResult:
    """SAEs, scores and descriptions to the suite; see `publish.run.run` for `by_bytes`."""
    heading("publish")
    return publish(stages.publish, by_bytes=by_bytes)


STAGES: dict[str, Callable[[Stages, JobEngine], Any]] = {
    "harvest": run_harvest,
    "train": run_training,
    "evaluate": run_evaluation,
    "describe": run_description,
    "explain": run_explanation,
}
"""What comes before the publication, in order."""
MOST_WRONG = 3.0
"""By this factor a plan's times are corrected at most [1]."""
SKIPPED_SECONDS = 2.0
"""A stage that took less was finished before, and tells nothing of the others [s]."""


class Outlook:
    """Says before each stage which of how many it is, and about how long the rest of the run takes."""

    def __init__(self, expected: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        """`expected` is the plan's time of each stage, in order [s]; what stages really take corrects the rest."""
        self._expected, self._clock = expected, clock
        self._began: tuple[str, float] | None = None
        self._planned = self._taken = 0.0

    def begin(self, stage: str) -> None:
        """The stage before it is done."""
        now = self._clock()
        if self._began is not None and now - self._began[1] > SKIPPED_SECONDS and self._expected[self._began[0]] > 0:
            self._planned += self._expected[self._began[0]]
            self._taken += now - self._began[1]
        names = list(self._expected)
        place = names.index(stage)
        rest = sum(self._expected[name] for name in names[place:])
        if self._planned > 0:  # within bounds, for a stage that was resumed tells less
            rest *= min(max(self._taken / self._planned, 1 / MOST_WRONG), MOST_WRONG)
        left = f", about {human_time(rest)} left of the run" if rest >= 1 else ""
        say(f"Stage {place + 1} of {len(names)}{left}")
        self._began = stage, now


def run_stages(
    stages: Stages,
    engine: EngineConfig = THIS_HOST.settings,
    watches: Sequence[Watch] = (),
    expected: Mapping[str, float] | None = None,
) -> PublishResult:
    """All stages, from text to suite; run again, it does nothing twice. `expected` is what a plan says of each stage [s]."""
    outlook = Outlook({name: (expected or {}).get(name, 0.0) for name in (*STAGES, "publish")})
    with run_folder(stages.config, stages.out), opened_engine(engine, stages.out, watches) as opened:
        for name, run in STAGES.items():
            outlook.begin(name)
            run(stages, opened)
        outlook.begin("publish")
        return run_publication(stages, by_bytes=False)  # else a finished run would read every byte of its suite


def run_recipe(config: RunConfig, out: Path, engine: EngineConfig = THIS_HOST.settings) -> PublishResult:
    """Check and run all stages of a config, from text to suite, in the folder `out`."""
    quiet_transformers()
    stages = stages_of(with_shape(config), out, found_devices(engine))
    check(stages, engine)
    return run_stages(stages, engine)


def _titled(stage: str, part: ModelPart, stages: Stages) -> str:
    return stage if part.config is stages.config else f"{stage} {part.config.name}"
