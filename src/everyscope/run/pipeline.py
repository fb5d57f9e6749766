"""A whole recipe, or one of its stages, in one folder: each stage skips what is whole and goes on where it stopped."""

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import logging

from everyscope.base.bundled import NO_CODE, model_location
from everyscope.base.errors import ConfigError, ModelError, first_line
from everyscope.base.files import make_folder, storage_errors, write_json
from everyscope.base.progress import heading, human_count, say
from everyscope.describe.explanations.run import run as explain
from everyscope.describe.run import run as describe
from everyscope.harvest.live import LiveHarvest
from everyscope.harvest.run import run as harvest
from everyscope.jobs.config import EngineConfig
from everyscope.jobs.job import Job
from everyscope.jobs.runner import LocalRunner, Runner, opened_runner
from everyscope.jobs.schedule import Watch
from everyscope.publish.run import PublishResult
from everyscope.publish.run import run as publish
from everyscope.run.activation_servers import served
from everyscope.run.config import RunConfig
from everyscope.run.jobs import (
    bank_jobs,
    bank_workers,
    comparison_jobs,
    evaluation_jobs,
    gather_scores,
    harvest_jobs,
    model_resources,
)
from everyscope.serve.config import ServeConfig
from everyscope.serve.live import LiveOrigin
from everyscope.serve.run import serve
from everyscope.train.config import TrainConfig

RECIPE_FILE, LOCK_FILE = "recipe.json", ".lock"
JOBS_FOLDER = "jobs"
"""In a run's folder: locks and events of jobs that run in other processes."""


@dataclass(frozen=True)
class Engine:
    """Where a run's jobs run, as it was asked for, and what runs them."""

    settings: EngineConfig
    runner: Runner


THIS_HOST = Engine(EngineConfig(), LocalRunner())


@contextmanager
def opened_engine(settings: EngineConfig, out: Path, watches: Sequence[Watch] = ()) -> Iterator[Engine]:
    """The engine of `settings` for a run in `out`; `watches` are told what becomes of jobs that leave this process."""
    with opened_runner(settings, out / JOBS_FOLDER, watches) as runner:
        yield Engine(settings, runner)


def quiet_transformers() -> None:
    """Leave the terminal to our own progress: no bar for every load of a small model, no advice about its arguments."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
            raise ConfigError(f"{out}: another run is at work here; wait for it, or choose another --out") from None
        if not is_shared:
            write_json(out / RECIPE_FILE, config.as_json())
        try:
            yield
        except Exception:
            if is_new and {path.name for path in out.iterdir()} == {RECIPE_FILE, LOCK_FILE}:
                shutil.rmtree(out)
            raise


def check_shape(config: RunConfig) -> None:
    """ConfigError where the recipe's sizes are not those of the model: its plan, and what it calls all layers, would be wrong."""
    name = config.model.name
    try:
        found = AutoConfig.from_pretrained(model_location(name), revision=config.model.revision, **NO_CODE)
        described = found.get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"no model {name!r}: {first_line(error)}; give a bundled model, a local folder or a hub id") from error
    head_dim = getattr(described, "head_dim", None) or described.hidden_size // described.num_attention_heads
    sizes = {
        "num_layers": described.num_hidden_layers,
        "d_model": described.hidden_size,
        "d_attention": described.num_attention_heads * head_dim,
    }
    for field, size in sizes.items():
        if getattr(config.shape, field) != size:
            raise ConfigError(f"shape.{field}={getattr(config.shape, field)}, but {name!r} has {size}; set shape.{field}={size}")


def run_harvest(
    config: RunConfig, out: Path, engine: Engine = THIS_HOST, partition: tuple[int, int] = (0, 1), heal: bool = False
) -> None:
    """Text and model to shards, for the run and its companions; of several processes each writes a partition."""
    for part, folder in config.parts(out):
        name = "harvest" if part is config else f"harvest {part.name}"
        heading(name)
        check_shape(part)
        part_config = part.harvest_config(folder).model_copy(update={"partition": partition, "heal": heal})
        resources = model_resources(part.model.device, engine.settings)
        count = engine.runner.side_by_side(resources)
        if partition == (0, 1) and count > 1:
            engine.runner.run(harvest_jobs(part_config, count, resources, name), name, "tokens")
            part_config = part_config.model_copy(update={"heal": False})
        result = harvest(part_config)  # where jobs have done it, this loads nothing
        say(f"  {human_count(result.num_rows)} rows at each of {len(result.folders)} sites in {folder / 'shards'}")
        if not result.is_sealed:
            say("  other partitions are still to come; whoever is last seals the folder")


def run_training(config: RunConfig, out: Path, engine: Engine = THIS_HOST) -> None:
    """Shards to folded SAEs, one bank a job."""
    heading("train")
    banks = [bank for part, folder in config.parts(out) for bank in part.train_configs(folder)]
    train_banks(config, banks, engine, out / JOBS_FOLDER if engine.settings.serve else None)
    say(f"  in {out / 'train'}")


def train_banks(config: RunConfig, banks: Sequence[TrainConfig], engine: Engine = THIS_HOST, servers: Path | None = None) -> None:
    """Train the banks of a recipe that are not finished, each a job; from servers of their shards, which keep their addresses in
    the folder `servers`, if there is one.
    """
    jobs = bank_jobs(banks, lambda bank: config.shape.d_in(bank.site), engine.settings)
    if servers is not None:
        jobs = served(jobs, engine.settings, servers)
    workers = bank_workers(banks, engine.settings) if isinstance(engine.runner, LocalRunner) else engine.settings.workers
    engine.runner.run(jobs, "banks", "steps", workers)
    say(f"  {sum(len(bank.saes) for bank in banks)} SAEs of {len(banks)} banks")


def serve_live(config: RunConfig, out: Path, serve_config: ServeConfig) -> None:
    """Serve what a harvest would write, made by the model as trainers ask for it, until SIGTERM; see `serve.run.run`.

    `out`/live keeps where buckets end and the scales. Trainers may work in `out` meanwhile: it is not held.
    """
    quiet_transformers()
    check_shape(config)
    harvest_config = config.harvest_config(out).model_copy(update={"out": out / "live"})
    serve(serve_config, LiveOrigin(LiveHarvest(harvest_config), serve_config))


def run_evaluation(config: RunConfig, out: Path, engine: Engine = THIS_HOST) -> None:
    """SAEs and held-out text to scores, then what is compared over the whole suite."""
    parts = list(config.parts(out))
    jobs: list[Job] = []
    for part, folder in parts:
        name = "evaluate" if part is config else f"evaluate {part.name}"
        resources = model_resources(part.model.device, engine.settings)
        jobs += evaluation_jobs(part.evaluate_config(folder), engine.settings.evaluate_jobs, resources, name)
    run_titled(jobs, "evaluate", engine)
    for part, folder in parts:
        gather_scores(part.evaluate_config(folder).out)
    run_titled(
        comparison_jobs(config.comparison_configs(out), model_resources(config.model.device, engine.settings)), "compare", engine
    )


def run_titled(jobs: Sequence[Job], title: str, engine: Engine) -> None:
    """Run jobs that show their own progress: here one after another, each below its name; elsewhere together."""
    if not isinstance(engine.runner, LocalRunner):
        heading(title)
        engine.runner.run(jobs, title, workers=engine.settings.workers)
        return
    for job in jobs:
        heading(job.name)
        engine.runner.run([job], job.name)


def run_description(config: RunConfig, out: Path, engine: Engine = THIS_HOST) -> None:
    """SAEs and text to what each latent fires on and what it writes."""
    resources = model_resources(config.model.device, engine.settings)
    run_titled([Job(describe, config.describe_config(out), "describe", resources)], "describe", engine)


def run_explanation(config: RunConfig, out: Path, engine: Engine = THIS_HOST) -> None:
    """Labels for every latent, learnt on training documents, scored on held-out ones."""
    resources = model_resources(config.model.device, engine.settings)
    run_titled([Job(explain, config.explain_config(out), "explain", resources)], "explain", engine)


def run_publication(config: RunConfig, out: Path, *, by_bytes: bool = True) -> PublishResult:
    """SAEs, scores and descriptions to the suite; see `publish.run.run` for `by_bytes`."""
    heading("publish")
    return publish(config.publish_config(out), by_bytes=by_bytes)


def run_recipe(
    config: RunConfig, out: Path, engine: EngineConfig = THIS_HOST.settings, watches: Sequence[Watch] = ()
) -> PublishResult:
    """All stages, from text to suite. Typed again, it does nothing twice."""
    with run_folder(config, out), opened_engine(engine, out, watches) as opened:
        run_harvest(config, out, opened)
        run_training(config, out, opened)
        run_evaluation(config, out, opened)
        run_description(config, out, opened)
        run_explanation(config, out, opened)
        return run_publication(config, out, by_bytes=False)  # else a finished run would read every byte of its suite
