"""The command line: one subcommand a stage. Flags are parsed before torch is imported, so that `--help` is quick."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from everyscope.base.allocator import keep_freed_memory
from everyscope.base.errors import ConfigError, EveryscopeError, first_line
from everyscope.base.progress import printable
from everyscope.base.schema import one_line
from everyscope.base.signals import EXIT_CODE, leave_on_termination
from everyscope.cli.arguments import WHAT_IT_IS, Command, OneLineParser, command_named, overview, parser_of, set_apart
from everyscope.cli.commands import COMMANDS
from everyscope.cli.flags import flags_of, parse_fields
from everyscope.cli.recipe import is_model, resolve
from everyscope.run.find import RECIPES, find_recipe

MAIN_FIELDS = (
    "--model.name", "--model.device", "--model.dtype", "--text.source", "--text.paths", "--text.dataset", "--text.context",
    "--groups.0.sites", "--groups.0.layers", "--groups.0.widths", "--groups.0.target-l0s", "--groups.0.num-tokens",
    "--train.device", "--train.batch-rows", "--harvest.dtype", "--evaluate.num-sequences", "--seed",
)  # fmt: skip
"""Fields of a recipe that --help shows; --help-all shows every one."""


def show_help(parser: OneLineParser, command: Command, options: argparse.Namespace, fields: list[str]) -> None:
    """A command's flags, and the fields of its recipe or config: the main ones, or with --help-all every one."""
    if command.takes_recipe and options.help_all:
        recipe = options.recipe if options.recipe and not is_model(options.recipe) else next(iter(RECIPES))
        resolve(argparse.Namespace(**vars(options) | {"recipe": recipe}), [*fields, "--help"])
        return
    parser.print_help()
    if command.config is not None:
        print()
        parse_fields(command.config, parser.prog, ["--help"])
    elif command.takes_recipe:
        recipe = options.recipe if options.recipe and not is_model(options.recipe) else next(iter(RECIPES))
        known = flags_of(find_recipe(recipe))
        print(f"\nmain fields of {recipe}:")
        for flag in MAIN_FIELDS:
            if flag in known:
                print(f"  {flag:<29} {known[flag].replace(chr(10), ' ').split('. ')[0].split('; ')[0].rstrip('.')}")
        print(f"\n`everyscope {options.command} {recipe} --help-all` lists every field.")


ERROR_EXIT = 1
INTERRUPTED_EXIT = 130
BATCH_COMMANDS = ("run", "harvest", "train", "evaluate", "describe", "explain")
"""Commands that work through batches and end."""


def complain(message: str) -> None:
    """One line of error, without what a terminal would obey: names and titles in it may come out of anybody's file."""
    print(f"everyscope: {printable(message)}", file=sys.stderr)


def dispatch(arguments: Sequence[str]) -> None:
    """Parse and run one command; errors go to the caller."""
    if any(word == "--token" or word.startswith("--token=") for word in arguments):  # not echoed, whatever follows it
        raise ConfigError(
            "--token: a secret on a command line shows in lists of processes and in the shell's history; "
            "set EVERYSCOPE_TOKEN, or give --token-file FILE"
        )
    if not arguments or arguments[0] in ("--help", "-h"):
        print(overview(COMMANDS))
        if not arguments:
            raise ConfigError("no command given; `everyscope run tiny` makes a first scope")
        return
    name = arguments[0]
    command = command_named(name, COMMANDS)
    parser = parser_of(name, command)
    words, apart = set_apart(command, parser.flags(), arguments[1:])
    options, fields = parser.parse_known_args(words)
    fields += apart
    options.command, options.flags = name, parser.flags()
    first = options.recipe if command.takes_recipe else options.path
    if command.config is None and not command.takes_recipe and fields:
        raise ConfigError(f"unknown argument {fields[0]}; `everyscope {name} --help` lists the flags")
    if options.help or getattr(options, "help_all", False):
        show_help(parser, command, options, fields)
        return
    if first is None:
        raise ConfigError(f"everyscope {name} needs a {command.takes}: {WHAT_IT_IS[command.takes]}")
    if getattr(options, "workers", None) is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: expected 1 or more")
    command.function(options, fields)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: exit code 0, or non-zero with one line that says what is wrong and what to do."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if arguments is None:  # else this process, its signals and streams, are somebody else's
        leave_on_termination()
        for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows ? for what it lacks, and ends no run
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        if given[:1] and given[0] in BATCH_COMMANDS:
            keep_freed_memory()
    try:
        dispatch(given)
    except (EveryscopeError, ValidationError) as error:  # the latter where fields of a recipe do not go together
        if "--debug" in given:
            raise
        complain(one_line(error) if isinstance(error, ValidationError) else str(error))
        sys.exit(ERROR_EXIT)
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more as it leaves
        sys.exit(ERROR_EXIT)
    except KeyboardInterrupt:
        print("everyscope: interrupted; run the same command to resume", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    except Exception as error:
        if "--debug" in given:
            raise
        what = f"{type(error).__name__}: {first_line(error)[:300]}"
        complain(f"internal error ({what}); please report it, with the output of --debug")
        sys.exit(ERROR_EXIT)
    except SystemExit as leaving:
        if leaving.code == EXIT_CODE:
            print("everyscope: asked to stop; run the same command to resume", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
