"""A whole recipe, or one of its stages, in one folder: each stage skips what is whole and goes on where it stopped."""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from everyscope.base.bundled import model_location
from everyscope.base.errors import ConfigError, ModelError, first_line
from everyscope.base.files import make_folder, storage_errors, write_json
from everyscope.base.progress import heading, human_count, say
from everyscope.describe.explanations.run import run as explain
from everyscope.describe.run import run as describe
from everyscope.evaluate.comparisons import precision, probing, random_model, splitting, subsets, transfer, widths
from everyscope.evaluate.comparisons.config import (
    PrecisionConfig,
    ProbingConfig,
    RandomModelConfig,
    SplittingConfig,
    SubsetsConfig,
    TransferConfig,
    WidthsConfig,
)
from everyscope.evaluate.run import run as evaluate
from everyscope.harvest.live import LiveHarvest
from everyscope.harvest.run import run as harvest
from everyscope.jobs.pool import Job, default_workers, run_jobs
from everyscope.publish.run import PublishResult
from everyscope.publish.run import run as publish
from everyscope.recipe import RunConfig
from everyscope.serve.config import ServeConfig
from everyscope.serve.live import LiveOrigin
from everyscope.serve.run import serve
from everyscope.train.config import TrainConfig
from everyscope.train.run import is_finished
from everyscope.train.run import run as train_bank

RECIPE_FILE, LOCK_FILE = "recipe.json", ".lock"
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
        described = AutoConfig.from_pretrained(model_location(name), revision=config.model.revision).get_text_config()
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


def run_harvest(config: RunConfig, out: Path, partition: tuple[int, int] = (0, 1), heal: bool = False) -> None:
    """Text and model to shards, for the run and its companions; of several processes each writes a partition."""
    for part, folder in config.parts(out):
        heading("harvest" if part is config else f"harvest {part.name}")
        check_shape(part)
        result = harvest(part.harvest_config(folder).model_copy(update={"partition": partition, "heal": heal}))
        say(f"  {human_count(result.num_rows)} rows at each of {len(result.folders)} sites in {folder / 'shards'}")
        if not result.is_sealed:
            say("  other partitions are still to come; whoever is last seals the folder")


def run_training(config: RunConfig, out: Path, workers: int | None = None) -> None:
    """Shards to folded SAEs, one bank a job; `workers` processes (None: one a core on the CPU)."""
    heading("train")
    train_banks([bank for part, folder in config.parts(out) for bank in part.train_configs(folder)], workers)
    say(f"  in {out / 'train'}")


def train_banks(banks: Sequence[TrainConfig], workers: int | None = None) -> None:
    """Train the banks that are not finished; `workers` processes (None: one a core on the CPU)."""
    pending = [bank for bank in banks if not is_finished(bank)]
    count = default_workers(len(banks), banks[0].settings.device) if workers is None else workers
    run_jobs([Job(train_bank, bank) for bank in pending], count, "banks", sum(bank.steps for bank in pending), "steps")
    say(f"  {sum(len(bank.saes) for bank in banks)} SAEs of {len(banks)} banks")


def serve_live(config: RunConfig, out: Path, serve_config: ServeConfig) -> None:
    """Serve what a harvest would write, made by the model as trainers ask for it, until SIGTERM; see `serve.run.run`.

    `out`/live keeps where buckets end and the scales. Trainers may work in `out` meanwhile: it is not held.
    """
    quiet_transformers()
    check_shape(config)
    harvest_config = config.harvest_config(out).model_copy(update={"out": out / "live"})
    serve(serve_config, LiveOrigin(LiveHarvest(harvest_config), serve_config))


def run_evaluation(config: RunConfig, out: Path) -> None:
    """SAEs and held-out text to scores, then what is compared over the whole suite."""
    for part, folder in config.parts(out):
        heading("evaluate" if part is config else f"evaluate {part.name}")
        evaluate(part.evaluate_config(folder))
    for comparison in config.comparison_configs(out):
        run = COMPARISONS[type(comparison)]
        heading(f"compare {run.__module__.rpartition('.')[2].replace('_', ' ')}")
        run(comparison)


def run_description(config: RunConfig, out: Path) -> None:
    """SAEs and text to what each latent fires on and what it writes."""
    heading("describe")
    describe(config.describe_config(out))


def run_explanation(config: RunConfig, out: Path) -> None:
    """Labels for every latent, learnt on training documents, scored on held-out ones."""
    heading("explain")
    explain(config.explain_config(out))


def run_publication(config: RunConfig, out: Path) -> PublishResult:
    """SAEs, scores and descriptions to the suite."""
    heading("publish")
    return publish(config.publish_config(out))


def run_recipe(config: RunConfig, out: Path, workers: int | None = None) -> PublishResult:
    """All stages, from text to suite. Typed again, it does nothing twice."""
    with run_folder(config, out):
        run_harvest(config, out)
        run_training(config, out, workers)
        run_evaluation(config, out)
        run_description(config, out)
        run_explanation(config, out)
        return run_publication(config, out)
