"""The commands: what each does once its flags are parsed. torch is imported within them, so that `--help` is quick."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from everyscope.activations.harvest.config import ImportConfig
from everyscope.activations.serve.config import ServeConfig
from everyscope.base.bundled import BUNDLED_MODELS
from everyscope.base.errors import ConfigError
from everyscope.browse.config import BrowseConfig, ExportConfig
from everyscope.cli.arguments import (
    Command,
    engine_of,
    text_fields,
    wants_cluster,
)
from everyscope.cli.circuit import circuit_command
from everyscope.cli.flags import Config, parse_fields, split_flags
from everyscope.cli.recipe import choices_of, is_model, new_config, rates_for, resolve
from everyscope.cli.stages import show_stages, show_suite
from everyscope.evaluate.config import EvaluateConfig
from everyscope.publish.circuit_tracer.config import CircuitTracerConfig
from everyscope.publish.neuronpedia.config import NeuronpediaConfig
from everyscope.run.config import RunConfig
from everyscope.run.find import RECIPES
from everyscope.run.jobs.config import EngineConfig
from everyscope.run.stages import ActivationSource, stages_of
from everyscope.sites.config import ModelConfig

if TYPE_CHECKING:
    from everyscope.browse.live import Live
    from everyscope.run.jobs.schedule import Watch
    from everyscope.run.placement import Devices
    from everyscope.sites.config import ModelConfig


def run_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Every stage, then the suite's table and what to type next."""
    config, out = resolve(options, fields)
    engine = engine_of(options)
    from everyscope.run import pipeline
    from everyscope.run.checks import check, found_devices
    from everyscope.run.cost.prices import stage_seconds
    from everyscope.sites.model import quiet_transformers

    quiet_transformers()
    stages = stages_of(config, out, found_devices(engine))
    check(stages, engine)
    if options.dry_run:
        show_stages(stages, options.json)
        return
    expected = stage_seconds(stages, rates_for(config, None)) if engine.engine == "local" else None
    result = pipeline.run_stages(stages, engine, watches(options), expected)
    show_suite(result.suite, options.json, is_line=engine.engine == "ray")


def watches(options: argparse.Namespace) -> "list[Watch]":
    """Receivers of job events beside the terminal: a program that reads standard output."""
    from everyscope.run.jobs.watch import printed

    return [printed] if options.json and options.engine == "ray" else []


def stage_command(options: argparse.Namespace, fields: list[str]) -> None:
    """One stage alone, in a run's folder."""
    config, out = resolve(options, fields)
    settings = engine_of(options) if hasattr(options, "engine") else EngineConfig()
    partition = partition_of(options, settings)
    from everyscope.run import pipeline
    from everyscope.run.checks import check, found_devices

    source = getattr(options, "source", None)
    servers = None if source is None else ActivationSource(source, options.order, options.tls_roots)
    devices = found_devices(settings) if options.command == "train" else None
    stages = stages_of(config, out, devices, servers=servers, harvests=options.command == "harvest")
    check(stages, settings, (options.command,))
    with pipeline.run_folder(config, out, is_shared=partition[1] > 1):
        if options.command == "publish":
            show_suite(pipeline.run_publication(stages).suite, options.json)
            return
        with pipeline.opened_engine(settings, out, watches(options)) as engine:
            if options.command == "harvest":
                pipeline.run_harvest(stages, engine, partition, options.repair)
            else:
                spent = pipeline.STAGES[options.command](stages, engine)
                if options.json and options.command == "train":
                    print(json.dumps({"event": "trained"} | spent))


def partition_of(options: argparse.Namespace, settings: EngineConfig) -> tuple[int, int]:
    """Which of how many partitions of the harvest this process writes."""
    given = getattr(options, "partition", None) or "0/1"
    index, slash, count = given.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--partition {given}: expected I/N with 0 <= I < N, as in 0/2 and 1/2")
    if given != "0/1" and settings.engine == "ray":
        raise ConfigError(f"--partition {given} with --engine ray: the engine divides the harvest; leave one out")
    return int(index), int(count)


def evaluate_command(options: argparse.Namespace, fields: list[str]) -> None:
    """The recipe's stage, or the evaluation of SAEs made elsewhere."""
    if options.recipe in RECIPES or options.recipe.endswith(".py") or is_model(options.recipe):
        stage_command(options, fields)
        return
    suite = Path(options.recipe)
    if not suite.is_dir():
        raise ConfigError(f"{suite}: neither a recipe ({', '.join(RECIPES)}, or a .py file) nor a folder of SAEs")
    out = options.out or Path("runs") / f"{suite.resolve().name}_scores"
    fields = ["--trained", str(suite), "--out", str(out), *fields]
    if options.model:
        fields += ["--model.name", options.model]
    if options.device:
        fields += ["--model.device", options.device]
    if options.text:
        fields += text_fields(options.text)
    config = parse_fields(EvaluateConfig, f"everyscope evaluate {suite}", fields, "Evaluation of SAEs that lie in a folder.")
    has_text = options.text or any(field.startswith("--text.") for field in fields)
    if not has_text and config.model.name not in BUNDLED_MODELS:
        raise ConfigError(
            f"evaluate {suite}: no text for model {config.model.name!r}; give text like that it was trained on with --text: a "
            "file, a folder or a Hugging Face dataset, or standard_library for Python sources"
        )
    from everyscope.evaluate.run import run
    from everyscope.evaluate.table import score_rows, score_table
    from everyscope.sites.model import quiet_transformers

    quiet_transformers()
    run(config)
    rows = score_rows(config)
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        Console().print(score_table(rows))
        print(f"\nScores  {out}")


def plan_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Print what a recipe costs; spends nothing."""
    config, out = resolve(options, fields)
    from everyscope.run.cost.cluster_report import cluster_report
    from everyscope.run.cost.machine import plan, plan_json, plan_tables

    if wants_cluster(options):
        rates = {"mfu": options.mfu, "disk_gbps": options.disk_gbps, "dollars": options.dollars_per_hour}
        found, tables = cluster_report(config, options.gpus, options.gpu, **rates, with_curve=options.curve)
    else:
        rates = {"disk_gbps": options.disk_gbps, "model_tokens_per_second": options.model_tokens_per_second}
        price = plan(stages_of(config, out, devices_here(config)), rates_for(config, options.teraflops), **rates)
        found, tables = plan_json(price), plan_tables(price)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for table in tables:
        Console().print(table)


def init_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Print the run of a model as a recipe in Python."""
    if not is_model(options.recipe):
        raise ConfigError(f"{options.recipe}: expected a model, as a Hugging Face id or a local folder")
    from everyscope.run.automatic import recipe_text

    choices = choices_of(options)
    print(recipe_text(new_config(options.recipe, choices), choices), end="")


def devices_here(config: RunConfig) -> "Devices | None":
    """The GPUs of this host, which only torch knows; a recipe that trains on the CPU does without torch."""
    if not config.train.device.startswith("cuda"):
        return None
    from everyscope.run.checks import found_devices

    return found_devices(EngineConfig())


def verify_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Check shards, a suite, or a run's folder that holds both, against their checksums."""
    from everyscope.activations.shards.verify import verify_shards
    from everyscope.suite.verify import verify_suite

    path: Path = options.path
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give a run's folder, its shards/ or its suite/")
    checks = {path / "shards": verify_shards, path / "suite": verify_suite}
    checks |= dict.fromkeys(sorted(path.glob("controls/*/shards")), verify_shards)
    found = {folder: check for folder, check in checks.items() if folder.is_dir()}
    if not found:
        found = {path: verify_suite if (path / "suite.json").exists() else verify_shards}
    for folder, check in found.items():
        check(folder)
        print(f"{folder}: OK: all checksums match")


def import_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Activations from elsewhere to a folder of shards."""
    config = configured(ImportConfig, options, "source", fields)
    from everyscope.activations.harvest.foreign import import_array

    result = import_array(config)
    print(f"{config.out}: {result.num_rows} rows of {config.site}; train on it with everyscope.LocalSource")


def serve_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Serve shards to trainers, or activations as a model makes them, or look at servers that do."""
    if options.watch:
        from everyscope.activations.serve.watch import watch

        if fields:
            raise ConfigError(f"--watch takes no {' '.join(fields)}; give HOST:PORT, --once, --token-file and --tls-roots alone")
        servers = str(options.path).split(",")
        watch(servers, token_file=options.token_file, roots=options.tls_roots, is_once=options.once)
        return
    if options.token_file is not None:
        fields = [*fields, "--token-file", str(options.token_file)]
    if options.live:
        serve_live_command(options, fields)
        return
    if options.out is not None:
        raise ConfigError(f"--out {options.out}: shards are served where they lie; leave it out, or serve a recipe with --live")
    config = configured(ServeConfig, options, "shards", fields)
    from everyscope.activations.serve.run import run

    run(config)


def serve_live_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Serve what the recipe's harvest would write, as the model makes it. Flags are the server's fields and the recipe's."""
    own, theirs = split_flags(fields, {*ServeConfig.model_fields, "help"} - {"shards"})
    options.recipe = str(options.path)
    recipe, out = resolve(options, theirs)
    about = "Fields of the server; those of the recipe, as `everyscope run RECIPE --help` lists them, are flags too."
    config = parse_fields(ServeConfig, f"everyscope serve {options.path} --live", own, about, recipe.live_config(out))
    from everyscope.run.pipeline import serve_live

    serve_live(recipe, out, config)


def browse_command(options: argparse.Namespace, fields: list[str]) -> None:
    """The suite's pages on 127.0.0.1, until Ctrl-C."""
    config = configured(BrowseConfig, options, "suite", fields)
    from everyscope.browse.run import run

    def live() -> "Live":
        from everyscope.browse.live_model import SuiteModel
        from everyscope.sites.model import quiet_transformers
        from everyscope.suite.layout import suite_folder

        quiet_transformers()
        model = None if config.model is None else ModelConfig(name=config.model)
        return SuiteModel(suite_folder(config.suite), model)

    run(config, live)


def export_command(options: argparse.Namespace, fields: list[str]) -> None:
    """The suite's pages as files for any web host, its latents for Neuronpedia, or its transcoders for circuit-tracer."""
    if options.format == "neuronpedia":
        from everyscope.publish.neuronpedia.run import run as write_for_neuronpedia

        print(write_for_neuronpedia(configured(NeuronpediaConfig, options, "suite", fields)).words)
        return
    if options.format == "circuit-tracer":
        tracer = configured(CircuitTracerConfig, options, "suite", fields)
        from everyscope.publish.circuit_tracer.run import run as write_for_circuit_tracer

        print(write_for_circuit_tracer(tracer).words)
        return
    config = configured(ExportConfig, options, "suite", fields)
    from everyscope.browse.export import run

    result = run(config)
    print(f"{result.num_pages} pages; open {result.first_page}")


def configured(kind: type[Config], options: argparse.Namespace, field: str, fields: list[str]) -> Config:
    """The config of a command that takes a path first, which is its field `field`."""
    given = [] if options.path is None else [f"--{field}", str(options.path)]
    name = options.path or COMMANDS[options.command].takes
    return parse_fields(kind, f"everyscope {options.command} {name}", [*given, *fields])


COMMANDS = {
    "run": Command("run the full pipeline (resumes if interrupted)", run_command, "RECIPE|MODEL"),
    "plan": Command("show every SAE of a run with its tokens, memory, compute and hours", plan_command, "RECIPE|MODEL"),
    "init": Command("print the default run of a model as a commented recipe", init_command, "MODEL"),
    "harvest": Command("run the model on text and write shards of activations", stage_command),
    "train": Command("train SAEs on shards", stage_command),
    "evaluate": Command("score SAEs on held-out text", evaluate_command, "RECIPE|SUITE"),
    "describe": Command("find top activating examples and logit effects of each latent", stage_command),
    "explain": Command("label latents and score the labels", stage_command),
    "publish": Command("collect SAEs, scores and descriptions into a suite", stage_command),
    "browse": Command("serve a suite's pages on this machine", browse_command, "SUITE", BrowseConfig),
    "circuit": Command("compute the attribution graph of a prompt", circuit_command, "SUITE"),
    "export": Command(
        "export a suite: pages for a web host, latents for Neuronpedia, or transcoders for circuit-tracer",
        export_command,
        "SUITE",
        ExportConfig,
    ),
    "serve": Command("serve shards to trainers in other processes or on other hosts", serve_command, "SHARDS", ServeConfig),
    "import": Command("convert activations made elsewhere into shards", import_command, "ARRAY", ImportConfig),
    "verify": Command("check shards or a suite against their checksums", verify_command, "PATH"),
}
