"""What --help and --help-all show of a command. Torch-free."""

import argparse

from everyscope.cli.arguments import Command, OneLineParser
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
