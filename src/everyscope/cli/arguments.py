"""The command line's arguments: what each command takes besides the fields of a recipe or config. Torch-free."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema, one_line
from everyscope.jobs.config import HERE, EngineConfig
from everyscope.run.find import RECIPES

DIVIDED = ("run", "harvest", "train", "evaluate", "describe", "explain")
"""Commands whose work consists of jobs."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in a line, the function that does it, and what it is given first."""

    help: str
    function: Callable[[argparse.Namespace, list[str]], None]
    takes: str = "RECIPE"
    config: type[Schema] | None = None
    """Whose fields the flags are, where there is no recipe; None takes no flags beyond ours."""


WHAT_IT_IS = {
    "RECIPE": f"{', '.join(RECIPES)}, or the path of a .py file",
    "RECIPE|SUITE": f"{', '.join(RECIPES)}, the path of a .py file, or a folder of SAEs",
    "SUITE": "the folder of a suite, or of the run that holds it",
    "SHARDS": "the folder `shards` of a run, or that of one site",
    "ARRAY": "a .npy or .safetensors file, or a folder of SAELens' cached activations",
    "PATH": "a run's folder, its shards/ or its suite/",
}


def parser(table: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of everything but a recipe's or config's own fields, which tyro reads; `table` has commands by name."""
    top = argparse.ArgumentParser(
        prog="everyscope",
        description="Sparse autoencoders on every layer and sub-layer of a language model.",
        epilog=f"RECIPE is one of {', '.join(RECIPES)}, or the path of a .py file, which runs as your own program: read a "
        "stranger's first. `everyscope run RECIPE --help` lists fields.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in table.items():
        has_fields = command.config is not None or command.takes.startswith("RECIPE")
        sub = commands.add_parser(name, help=command.help, description=command.help, add_help=not has_fields, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if has_fields:
            sub.add_argument("--help", "-h", action="store_true", help="show this and all fields")
        if not command.takes.startswith("RECIPE"):
            sub.add_argument("path", type=Path, metavar=command.takes, nargs="?" if has_fields else None)
        else:
            add_recipe_arguments(sub, name, command.takes)
        if name == "serve":
            add_serve_arguments(sub)
        if name == "export":
            sub.add_argument(
                "--format", choices=["pages", "neuronpedia"], default="pages", help="for web hosts, or for Neuronpedia"
            )
    return top


def add_recipe_arguments(sub: argparse.ArgumentParser, name: str, takes: str) -> None:
    """What commands take that work from a recipe."""
    sub.add_argument("recipe", metavar=takes, nargs="?", help=f"{', '.join(RECIPES)}, or the path of a .py file")
    sub.add_argument("--out", type=Path, help="the run's folder (default: runs/<recipe>)")
    sub.add_argument(
        "--json",
        action="store_true",
        help="results as JSON on standard output; with --engine ray, events of jobs before them",
    )
    if name in DIVIDED:
        add_engine_arguments(sub, name)
    if name == "train":
        sub.add_argument("--source", help="where activations come from instead of the run's shards, as flight://HOST:PORT")
        sub.add_argument(
            "--order", choices=["fixed", "any"], default="fixed", help="of servers' chunks: the shards', or as they come"
        )
    if name == "harvest":
        sub.add_argument("--partition", metavar="I/N", help="write every N-th bucket from I on; other processes write the others")
        sub.add_argument("--heal", action="store_true", help="read all that is there first, and write damaged shards anew")
    if name == "plan":
        sub.add_argument("--teraflops", type=float, help="sustained rate to reckon with [10^12/s] (default: measured here)")
        sub.add_argument("--disk-gbps", type=float, help="rate of the disk [GB/s] (default: measured in --out)")
        sub.add_argument("--model-tokens-per-second", type=float, help="rate of the model (default: by --teraflops)")
        sub.add_argument("--gpus", type=int, help="place the banks on so many devices of a cluster, simulated")
        sub.add_argument("--gpu", help="with --gpus, their kind: h100, h200, a100, tpuv3, or a .json file of measured rates")
        sub.add_argument("--mfu", type=float, help="with --gpus, measured FLOP utilisation of a step (default: a roofline)")
        sub.add_argument("--curve", action="store_true", help="with --gpus, speed-up and bottleneck for fewer devices as well")
    if name == "evaluate":
        sub.add_argument("--model", help="for a folder of SAEs: their language model, a bundled one, a folder or a hub id")
        sub.add_argument("--text", help="for a folder of SAEs: a source of ours, a file or folder, or a dataset on the hub")


def add_serve_arguments(sub: argparse.ArgumentParser) -> None:
    """What `serve` takes beyond the server's fields."""
    sub.add_argument("--live", action="store_true", help="SHARDS is a RECIPE, whose model makes activations as trainers ask")
    sub.add_argument("--out", type=Path, help="with --live, the run's folder (default: runs/<recipe>)")
    sub.add_argument("--watch", action="store_true", help="look at running servers: SHARDS is then HOST:PORT[,HOST:PORT]")
    sub.add_argument("--once", action="store_true", help="with --watch, look once")
    sub.add_argument("--token-file", type=Path, help="a file with the token (default: EVERYSCOPE_TOKEN)")
    sub.add_argument("--tls-roots", type=Path, help="with --watch, the certificates to trust, PEM")


def add_engine_arguments(sub: argparse.ArgumentParser, name: str) -> None:
    """Where the jobs of a command run."""
    sub.add_argument("--engine", choices=["local", "ray"], default="local", help="where jobs run: this host, or a Ray cluster")
    sub.add_argument(
        "--address",
        default=HERE,
        help=f"of the Ray cluster, HOST:PORT (default: {HERE}, one that ends with the command)",
    )
    if name in ("run", "train"):
        sub.add_argument("--workers", type=int, help="banks trained side by side (default: one a core, on GPUs as fit)")
        sub.add_argument("--serve", action="store_true", help="banks read from activation servers, which are jobs beside them")
        sub.add_argument("--tls-certificate", type=Path, help="with --serve, the servers' certificate chain, PEM")
        sub.add_argument("--tls-key", type=Path, help="with --serve, its private key, PEM")
        sub.add_argument("--tls-roots", type=Path, help="certificates to trust servers by, PEM")
        sub.add_argument("--device-gib", type=float, help="memory of one GPU, which banks share [GiB] (default: this host's)")
    if name in ("run", "evaluate"):
        sub.add_argument("--evaluate-jobs", type=int, default=1, help="jobs among which SAEs are divided for their scores")
    sub.add_argument("--job-cpus", type=int, help="cores and threads of each job (default: as without engine)")
    sub.add_argument("--model-gpus", type=int, default=1, help="GPUs of each job that runs the language model (default: 1)")
    sub.add_argument("--tries", type=int, default=5, help="attempts of a job that bring it no further before the run gives up")
    sub.add_argument("--patience", type=float, default=600, help="how long a cluster may be away [s]")


def engine_of(options: argparse.Namespace) -> EngineConfig:
    """The engine that a command line asks for; ConfigError, in one line, where its flags do not go together."""
    gib = getattr(options, "device_gib", None)
    try:
        return EngineConfig(
            engine=options.engine,
            address=options.address,
            workers=getattr(options, "workers", None),
            job_cpus=options.job_cpus,
            model_gpus=options.model_gpus,
            evaluate_jobs=getattr(options, "evaluate_jobs", 1),
            device_bytes=None if gib is None else int(gib * 2**30),
            serve=getattr(options, "serve", False),
            tls_certificate=getattr(options, "tls_certificate", None),
            tls_key=getattr(options, "tls_key", None),
            tls_roots=getattr(options, "tls_roots", None),
            tries=options.tries,
            patience_seconds=options.patience,
        )
    except ValidationError as error:
        raise ConfigError(one_line(error)) from error
