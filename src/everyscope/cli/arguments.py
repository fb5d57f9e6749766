"""The command line's own flags: what each command takes besides the fields of a recipe or config. The one place for argparse."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from pydantic import ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.schema import Schema, one_line
from everyscope.run.find import RECIPES
from everyscope.run.jobs.config import HERE, EngineConfig
from everyscope.sites.names import SITE_KINDS
from everyscope.text.config import TextSource

JOB_COMMANDS = ("run", "harvest", "train", "evaluate", "describe", "explain")
"""Commands whose work is divided into jobs."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in a line, the function that does it, and its first argument."""

    help: str
    function: Callable[[argparse.Namespace, list[str]], None]
    takes: str = "RECIPE"
    config: type[Schema] | None = None
    """Whose fields are flags, where there is no recipe; None takes no flags beyond ours."""

    @property
    def takes_recipe(self) -> bool:
        """Whether a recipe's fields are flags too."""
        return self.takes.startswith("RECIPE") or self.takes == "MODEL"


RECIPE_WORDS = f"{', '.join(RECIPES)}, or the path of a .py file"
OWN_PROGRAM = "a .py file is executed, by plan and --help too: read a stranger's first"
WHAT_IT_IS = {
    "RECIPE": RECIPE_WORDS,
    "RECIPE|MODEL": f"{RECIPE_WORDS}, or a model: a Hugging Face id or a local folder",
    "MODEL": "a Hugging Face id or a local folder",
    "RECIPE|SUITE": f"{RECIPE_WORDS}, or a folder of SAEs",
    "SUITE": "the folder of a suite, or of the run that holds it",
    "SHARDS": "the folder `shards` of a run, or that of one site",
    "ARRAY": "a .npy or .safetensors file, or a folder of SAELens' cached activations",
    "PATH": "a run's folder, its shards/ or its suite/",
}


class OneLineParser(argparse.ArgumentParser):
    """Takes flags by their full names alone, and raises ConfigError, in one line, for what it does not take."""

    def __init__(self, prog: str, description: str) -> None:
        """Without argparse's own --help."""
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        """In place of argparse's usage and exit."""
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")

    def flags(self) -> set[str]:
        """All flags, with their dashes."""
        return set(re.findall(r"--[a-z][a-z-]*", self.format_usage()))


def overview(table: Mapping[str, Command]) -> str:
    """What `everyscope --help` prints."""
    width = max(map(len, table)) + 2
    lines = ["usage: everyscope COMMAND ...", "", "Sparse autoencoders on every layer and sub-layer of a language model.", ""]
    lines += [f"  {name:<{width}}{command.help}" for name, command in table.items()]
    lines += ["", f"RECIPE is one of {RECIPE_WORDS}; {OWN_PROGRAM}."]
    lines += ["`everyscope COMMAND --help` lists the flags of a command."]
    return "\n".join(lines)


def command_named(name: str, table: Mapping[str, Command]) -> Command:
    """The command of that name; ConfigError, with the nearest, for any other."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown command {name!r}; {hint}`everyscope --help` lists the commands")


def parser_of(name: str, command: Command) -> OneLineParser:
    """The parser of one command; fields of its recipe or config are left over for `cli.flags`."""
    parser = OneLineParser(f"everyscope {name}", command.help)
    add = parser.add_argument
    if command.takes_recipe:
        add("recipe", metavar=command.takes, nargs="?", help=f"{WHAT_IT_IS[command.takes]}; {OWN_PROGRAM}")
        add_recipe_arguments(parser, name)
    else:
        add("path", metavar=command.takes, type=Path, nargs="?", help=WHAT_IT_IS[command.takes])
    if name == "serve":
        add_serve_arguments(parser)
    if name == "circuit":
        add_circuit_arguments(parser)
    if name == "export":
        formats = ["pages", "neuronpedia", "circuit-tracer"]
        add("--format", choices=formats, default="pages", help="for web hosts, for Neuronpedia, or for circuit-tracer")
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--help", "-h", action="store_true", help="show this")
    if command.takes_recipe:
        add("--help-all", action="store_true", help="show every field of the recipe, each of which is a flag")
    return parser


def set_apart(command: Command, own: Collection[str], arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command-line words without the flags of a config's fields and their values, and those: argparse, which does not know them,
    would take a value that stands before the path, as in `browse --port 9000 runs/tiny`, for the path. Flags that are the
    command's `own` stay, even where a field has the same name.
    """
    fields = {} if command.takes_recipe or command.config is None else command.config.model_fields
    flags = {f"--{name.replace('_', '-')}" for name, field in fields.items() if field.annotation is not bool}
    flags -= set(own)
    rest, apart = list(arguments), []
    for place in reversed(range(len(rest) - 1)):
        if rest[place] in flags:
            apart = rest[place : place + 2] + apart
            del rest[place : place + 2]
    return rest, apart


def add_recipe_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """What commands take that work from a recipe."""
    add = parser.add_argument
    add("--out", type=Path, help="the run's folder (default: runs/<recipe>)")
    add("--json", action="store_true", help="print results as JSON; with --engine ray, events of jobs before them")
    add("--device", help="of the model and of training: cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    if name in ("run", "plan", "init"):
        add_choices(parser)
    if name == "run":
        add("--dry-run", action="store_true", help="check everything and show every stage, then stop")
    if name in JOB_COMMANDS:
        add_engine_arguments(parser, name)
    if name == "train":
        add("--source", help="read activations from servers in place of the run's shards: flight://HOST:PORT")
        order = "order of the servers' chunks: fixed is deterministic, any takes the first available"
        add("--order", choices=["fixed", "any"], default="fixed", help=order)
    if name == "harvest":
        add("--partition", metavar="I/N", help="write every N-th bucket from I on; other processes write the rest")
        add("--repair", action="store_true", help="verify all shards first and rewrite damaged ones")
    if name == "plan":
        add_plan_arguments(parser)
    if name == "evaluate":
        add("--model", help="for a folder of SAEs: their language model, a bundled one, a folder or a hub id")
        add("--text", help="for a folder of SAEs: a built-in source, a file or folder, or a dataset on the hub")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What may be said of a run of a model."""
    add = parser.add_argument_group("for a MODEL (a Hugging Face id or a local folder)").add_argument
    add("--sites", nargs="+", choices=SITE_KINDS, help="kinds of sites (default: resid_post)")
    add("--layers", nargs="+", type=int, help="layers, from 0 (default: one half-way, one at 85 %% of the depth)")
    add("--widths", nargs="+", type=int, help="numbers of latents (default: about 8 times the model's width)")
    add("--l0", nargs="+", type=float, help="active latents per token to aim at (default: 20 50 100)")
    add("--tokens", type=int, help="tokens of text to harvest (default: as --hours allow)")
    add("--passes", type=int, help="passes over them (default: as many as pay off here, at most 8)")
    add("--text", help="a file or folder, or a dataset on the hub (default: FineWeb-Edu)")
    add("--hours", type=float, help="how long all stages may take (default: 1)")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Rates and machines that `plan` assumes."""
    add = parser.add_argument
    add("--teraflops", type=float, help="assumed sustained throughput [10^12/s] (default: measured here)")
    add("--disk-gbps", type=float, help="throughput of the disk [GB/s] (default: measured in --out)")
    add("--model-tokens-per-second", type=float, help="throughput of the model (default: by --teraflops)")
    add("--gpus", type=int, help="simulate training on this many GPUs of a cluster")
    add("--gpu", help="with --gpus, their kind: h100, h200, a100, tpuv3, or a .json file of measured rates")
    add("--mfu", type=float, help="with --gpus, measured FLOP utilisation of a step (default: a roofline)")
    add("--dollars-per-hour", type=float, help="with --gpus, price of one GPU [USD/h]")
    add("--curve", action="store_true", help="with --gpus, also show speed-up and bottleneck for fewer GPUs")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes beyond the server's fields."""
    add = parser.add_argument
    add("--live", action="store_true", help="SHARDS is a RECIPE, whose model computes activations on request")
    add("--out", type=Path, help="with --live, the run's folder (default: runs/<recipe>)")
    add("--watch", action="store_true", help="show live status of running servers: SHARDS is then HOST:PORT[,HOST:PORT]")
    add("--once", action="store_true", help="with --watch, show it once")
    add("--token-file", type=Path, help="a file with the token (default: EVERYSCOPE_TOKEN)")
    add("--tls-roots", type=Path, help="with --watch, trusted certificates, PEM")


def add_circuit_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose circuit is drawn, of what, and how much of it."""
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="the text whose next token is explained")
    add("--target", nargs="+", metavar="TOKEN", help="next tokens to explain (default: the likeliest, up to 95 %% or 10)")
    add("--against", metavar="TOKEN", help="explain the logit of one --target minus that of this token")
    add("--latent", metavar="L.P.I", help="explain latent I of layer L at position P (BOS is 0) instead of tokens")
    add("--through", choices=["transcoders", "saes"], help="whose latents are nodes (default: transcoders, if there are any)")
    add("--width", type=int, help="width of the transcoders (default: the widest)")
    add("--l0", type=float, help="L0 of the transcoders, the nearest are taken (default: the canonical ones)")
    add("--max-latents", type=int, help="latents whose inputs are computed, most influential first (default: 2048)")
    add("--node-share", type=float, default=0.8, help="share of influence that shown nodes keep (default: 0.8)")
    add("--edge-share", type=float, default=0.98, help="share of influence that shown edges keep (default: 0.98)")
    add("--validate", type=int, default=0, metavar="N", help="remove N latents one by one and compare with the graph")
    add("--model", help="the language model, a folder or hub id, where the suite's name does not find it")
    add("--out", type=Path, help="the graph's file (default: circuits/<prompt> in the suite)")
    add("--circuit-tracer", type=Path, metavar="FILE", help="also write the pruned graph as circuit-tracer's JSON")
    add("--export", type=Path, metavar="FILE", help="also write the graph's page as one HTML file, which opens without a server")
    add("--import", type=Path, metavar="FILE", dest="import_file", help="circuit-tracer's JSON, or a graph's file, for a PROMPT")
    add("--json", action="store_true", help="print results as JSON")


def add_engine_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Where the jobs of a command run."""
    add = parser.add_argument_group("jobs and where they run").add_argument
    add("--engine", choices=["local", "ray"], default="local", help="where jobs run: this host, or a Ray cluster")
    add("--address", default=HERE, help=f"of the Ray cluster, HOST:PORT (default: {HERE}, started for this command)")
    if name in ("run", "train"):
        add("--workers", type=int, help="parallel training groups (default: one per core, on GPUs as many as fit)")
        add("--device-gib", type=float, help="memory of one GPU, which training groups share [GiB] (default: this host's)")
        add("--gpus", type=int, help="with --engine ray, GPUs of the cluster, to divide training groups evenly")
        add("--gpus-per-host", type=int, help="with --engine ray, GPUs of each host, to shard SAEs (default: this host's, or 8)")
        add("--serve", action="store_true", help="with --engine ray, start activation servers for training")
        add("--tls-certificate", type=Path, help="with --serve, the servers' certificate chain, PEM")
        add("--tls-key", type=Path, help="with --serve, its private key, PEM")
        add("--tls-roots", type=Path, help="trusted certificates of servers, PEM")
    if name in ("run", "evaluate"):
        add("--evaluate-jobs", type=int, help="parallel jobs of the evaluation (default: one per core)")
    add("--job-cpus", type=int, help="CPU cores and threads of each job")
    add("--model-gpus", type=int, default=1, help="GPUs of each job that runs the language model (default: 1)")
    add("--tries", type=int, default=5, help="retries without progress before a job fails (default: 5)")
    add("--patience", type=float, default=600, help="timeout while the cluster is unreachable [s] (default: 600)")


def engine_of(options: argparse.Namespace) -> EngineConfig:
    """The engine that a command line asks for; ConfigError, in one line, where its flags do not go together."""
    own = ("engine", "address", "workers", "gpus", "gpus_per_host", "serve", "tls_certificate", "tls_key", "tls_roots")
    own += ("evaluate_jobs", "job_cpus", "model_gpus", "tries")
    given = {name: getattr(options, name) for name in own if hasattr(options, name)}
    if getattr(options, "device_gib", None) is not None:
        given["device_bytes"] = int(options.device_gib * 2**30)
    try:
        return EngineConfig(**given, patience_seconds=options.patience)
    except ValidationError as error:
        raise ConfigError(one_line(error)) from error


def wants_cluster(options: argparse.Namespace) -> bool:
    """Whether the flags of `everyscope plan` ask for a cluster; ConfigError for flags that do not go together."""
    of_cluster = {"--gpu": options.gpu, "--mfu": options.mfu, "--curve": options.curve or None}
    of_cluster["--dollars-per-hour"] = options.dollars_per_hour
    of_machine = {"--teraflops": options.teraflops, "--model-tokens-per-second": options.model_tokens_per_second}
    given = next((flag for flag, value in of_cluster.items() if value is not None), None)
    if options.gpus is None and given is not None:
        raise ConfigError(f"{given} describes a cluster; give its number of GPUs with --gpus N")
    if options.gpus is not None and options.gpu is None:
        raise ConfigError(f"--gpus {options.gpus}: give their kind with --gpu: h100, h200, a100, tpuv3 or a .json file of rates")
    price = options.dollars_per_hour
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise ConfigError(f"--dollars-per-hour {price:g}: expected a price above 0")
    given = next((flag for flag, value in of_machine.items() if value is not None), None)
    if options.gpus is not None and given is not None:
        raise ConfigError(f"{given} describes this machine, not --gpus {options.gpus}; leave it out, or give --mfu")
    return options.gpus is not None


def text_fields(text: str) -> list[str]:
    """The flags of a text that is named in one word: one of our sources, local files, or a Hugging Face dataset."""
    if text in get_args(TextSource):
        return ["--text.source", text]
    if Path(text).exists():
        return ["--text.source", "files", "--text.paths", text]
    return ["--text.source", "dataset", "--text.dataset", text]
