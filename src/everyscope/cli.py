"""The command line: one subcommand a stage. Flags are parsed before torch is imported, so that `--help` is quick."""

import argparse
import contextlib
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from pydantic import ValidationError
from rich.console import Console

from everyscope.base.errors import ConfigError, EveryscopeError
from everyscope.base.signals import EXIT_CODE, leave_on_termination
from everyscope.recipe import RunConfig
from everyscope.recipes import RECIPES, find_recipe, one_line

ERROR_EXIT = 1
INTERRUPTED_EXIT = 130


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does in a line, and the function that does it."""

    help: str
    function: Callable[[argparse.Namespace, list[str]], None]
    takes_recipe: bool = True


def resolve(options: argparse.Namespace, fields: list[str]) -> tuple[RunConfig, Path]:
    """The recipe with the fields that flags override, and the run's folder."""
    default = find_recipe(options.recipe)
    prog = f"everyscope {options.command} {options.recipe}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config = tyro.cli(
                RunConfig, default=default, args=fields, prog=prog, description=f"Fields of the recipe {default.name!r}."
            )
    except ValidationError as error:
        raise ConfigError(one_line(error)) from error
    except SystemExit as error:
        if not error.code:
            raise
        raise ConfigError(f"{unboxed(complaint.getvalue())}; `{prog} --help` lists the fields") from error
    return config, options.out or Path("runs") / config.name


def unboxed(box: str) -> str:
    """What tyro drew a box around, as one line: without its title, its frame, its footer and pydantic's link."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(itertools.takewhile(bool, lines))
    return re.sub(r"\s*(\[type=[^]]*\])?\s*For further information visit \S+", "", text).rstrip(".")


def run_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Every stage, then the suite's table and what to type next."""
    config, out = resolve(options, fields)
    from everyscope.run import run_recipe

    result = run_recipe(config, out, options.workers)
    show_suite(result.suite, options.json)


def stage_command(options: argparse.Namespace, fields: list[str]) -> None:
    """One stage alone, in a run's folder."""
    config, out = resolve(options, fields)
    from everyscope import run

    with run.run_folder(config, out):
        if options.command == "harvest":
            run.run_harvest(config, out)
        elif options.command == "train":
            run.run_training(config, out, options.workers)
        elif options.command == "evaluate":
            run.run_evaluation(config, out)
        else:
            show_suite(run.run_publication(config, out).suite, options.json)


def plan_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Print what a recipe costs; spends nothing."""
    config, _ = resolve(options, fields)
    from everyscope.plan import plan, plan_json, plan_tables

    price = plan(config, options.teraflops)
    if options.json:
        print(json.dumps(plan_json(price), indent=2))
        return
    for table in plan_tables(price):
        Console().print(table)


def verify_command(options: argparse.Namespace, fields: list[str]) -> None:
    """Check shards, a suite, or a run's folder that holds both, against their checksums."""
    from everyscope.shards.verify import verify_shards
    from everyscope.suite.records import verify_suite

    path: Path = options.path
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; give a run's folder, its shards/ or its suite/")
    checks = {path / "shards": verify_shards, path / "suite": verify_suite}
    found = {folder: check for folder, check in checks.items() if folder.is_dir()}
    if not found:
        found = {path: verify_suite if (path / "suite.json").exists() else verify_shards}
    for folder, check in found.items():
        check(folder)
        print(f"{folder}: whole, every checksum agrees")


def show_suite(suite: Path, is_json: bool) -> None:
    """The suite's table on standard output, or its index as JSON, and what to type next."""
    from everyscope.publish.table import suite_table
    from everyscope.suite.records import read_index

    index = read_index(suite)
    if is_json:
        print(json.dumps(index.as_json(), indent=2))
        return
    console = Console()
    console.print(suite_table(index))
    first = suite / index.saes[0].folder
    console.print(f"\nSuite   {suite}\nReport  {suite / 'report' / 'index.html'}\n", highlight=False)
    console.print("Next    open the report in a web browser, or", highlight=False)
    console.print(f"        everyscope verify {suite}", highlight=False, soft_wrap=True)
    console.print(
        f"        python -c \"import everyscope; print(everyscope.load_sae('{first}'))\"", highlight=False, soft_wrap=True
    )


COMMANDS = {
    "run": Command("every stage: harvest, train, evaluate, publish; resumes what is there", run_command),
    "plan": Command("every SAE, its tokens, bytes, operations and hours, before anything is spent", plan_command),
    "harvest": Command("text and model to shards of activations", stage_command),
    "train": Command("shards to SAEs", stage_command),
    "evaluate": Command("SAEs and held-out text to scores", stage_command),
    "publish": Command("SAEs and scores to the suite", stage_command),
    "verify": Command("check shards or a suite against their checksums", verify_command, takes_recipe=False),
}


def parser() -> argparse.ArgumentParser:
    """The parser of everything but a recipe's own fields, which tyro reads."""
    top = argparse.ArgumentParser(
        prog="everyscope",
        description="Sparse autoencoders on every layer and sub-layer of a language model.",
        epilog=f"RECIPE is one of {', '.join(RECIPES)}, or the path of a .py file. `everyscope run RECIPE --help` lists fields.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help, add_help=not command.takes_recipe)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if not command.takes_recipe:
            sub.add_argument("path", type=Path, metavar="PATH", help="a run's folder, its shards/ or its suite/")
            continue
        sub.add_argument("recipe", metavar="RECIPE", nargs="?", help=f"{', '.join(RECIPES)}, or the path of a .py file")
        sub.add_argument("--out", type=Path, help="the run's folder (default: runs/<recipe>)")
        sub.add_argument("--json", action="store_true", help="results as JSON on standard output")
        sub.add_argument("--help", "-h", action="store_true", help="show this, and with a RECIPE all its fields")
        if name in ("run", "train"):
            sub.add_argument("--workers", type=int, help="banks trained side by side (default: one a core on the CPU, else 1)")
        if name == "run":
            sub.add_argument("--engine", choices=["local"], default="local", help="where jobs run")
        if name == "plan":
            sub.add_argument("--teraflops", type=float, help="sustained rate to reckon with [10^12/s] (default: measured here)")
    return top


def dispatch(arguments: Sequence[str]) -> None:
    """Parse and run one command; errors go to the caller."""
    top = parser()
    options, fields = top.parse_known_args(arguments)
    command = COMMANDS[options.command]
    if not command.takes_recipe and fields:
        top.error(f"unrecognized arguments: {' '.join(fields)}")
    if command.takes_recipe and (options.recipe is None or options.help):
        commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
        commands.choices[options.command].print_help()
        if options.recipe is None:
            if not options.help:
                raise ConfigError(f"everyscope {options.command} needs a RECIPE: {', '.join(RECIPES)}, or the path of a .py file")
            return
        fields = [*fields, "--help"]
    if getattr(options, "workers", None) is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more")
    command.function(options, fields)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: exit code 0, or non-zero with one line that says what is wrong and how to mend it."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:  # else this process, and what it does with signals, is somebody else's
        leave_on_termination()
    try:
        dispatch(given)
    except EveryscopeError as error:
        if "--debug" in given:
            raise
        print(f"everyscope: {error}", file=sys.stderr)
        sys.exit(ERROR_EXIT)
    except KeyboardInterrupt:
        print("everyscope: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    except SystemExit as leaving:
        if leaving.code == EXIT_CODE:
            print("everyscope: asked to stop; the same command goes on from here", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
