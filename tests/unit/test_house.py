"""The rules of the house (CONTRIBUTING.md) that neither ruff nor import-linter can check."""

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import everyscope
from everyscope.base.schema import Schema

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/everyscope"
FILES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
HEAVY = ("torch", "transformers", "matplotlib")
"""What nothing torch-free may load."""
LIGHT = ("everyscope.base", "everyscope.browse", "everyscope.cli", "everyscope.run.cost", "everyscope.run.find")
"""Packages that are torch-free, beside every config.py; of `browse` all but the model behind its live pages."""

IMPORTED_AS = {"pyyaml": "yaml"}
"""Packages whose module has another name."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def place(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if isinstance(node, ast.stmt) else ""
    return f"{path.relative_to(ROOT)}{line}"


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(TREES[path]) if isinstance(node, Function))


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | Function]:
    """Public classes and functions of a module, and public methods and classes inside public classes."""
    for node in body:
        is_overload = isinstance(node, Function) and any(ast.unparse(one) == "overload" for one in node.decorator_list)
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_") and not is_overload:
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def module_names() -> list[str]:
    return [found.name for found in pkgutil.walk_packages(everyscope.__path__, "everyscope.")]


def loads_heavy(modules: list[str]) -> list[str]:
    """Which heavy packages a fresh interpreter holds after importing `modules`."""
    code = f"import importlib, json, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_files_are_short():
    long = {place(path): count for path in FILES if (count := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert not long, f"files of more than {MAX_FILE_LINES} lines hold more than one subject: {long}"


def test_functions_are_short():
    lengths = {
        f"{place(path, node)} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for path in FILES for node in functions(path)
    }
    long = {name: count for name, count in lengths.items() if count > MAX_FUNCTION_LINES}
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines do more than one thing: {long}"


def test_folder_inits_are_empty():
    full = [place(path) for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE and path.stat().st_size]
    assert not full, f"only the root lists public names: {full}"


def test_names_say_something():
    empty = [place(path) for path in FILES if EMPTY_WORDS & {*path.stem.split("_"), *path.parent.name.split("_")}]
    assert not empty, f"a name says what is inside: {empty}"


def test_everything_public_has_a_docstring():
    silent = [place(path) for path in FILES if TREES[path].body and not ast.get_docstring(TREES[path])]
    silent += [
        f"{place(path, node)} {node.name}"
        for path in FILES
        for node in public_definitions(TREES[path].body)
        if not ast.get_docstring(node)
    ]
    assert not silent, f"no docstring: {silent}"


def test_imports_stand_at_the_top():
    hidden = [
        place(path, node)
        for path in FILES
        if path.parent != PACKAGE / "cli"
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not hidden, f"imports inside functions (an optional package goes through base.extras.import_extra): {hidden}"


def test_imports_are_declared_dependencies():
    packages = {re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in PYPROJECT["project"]["dependencies"]}
    declared = {IMPORTED_AS.get(package, package) for package in packages}
    known = declared | sys.stdlib_module_names | {PACKAGE.name}
    unknown = []
    for path in FILES:
        for node in ast.walk(TREES[path]):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unknown += [f"{place(path, node)} {name}" for name in names if name.split(".")[0] not in known]
    assert not unknown, f"not in pyproject's dependencies (extras go through base.extras.import_extra): {unknown}"


def test_every_config_field_is_described():
    for name in module_names():
        importlib.import_module(name)
    schemas, found = [Schema], []
    while schemas:
        schema = schemas.pop()
        schemas += schema.__subclasses__()
        if schema.__module__.startswith("everyscope"):
            found += [f"{schema.__name__}.{name}" for name, field in schema.model_fields.items() if not field.description]
    assert not found, f"fields without a docstring: {found}"


def test_configs_and_the_command_line_load_no_torch():
    light = [
        name
        for name in module_names()
        if (name.startswith(LIGHT) and name not in ("everyscope.browse.live_model", "everyscope.browse.live_writing"))
        or name.endswith(".config")
        or name == "everyscope.sites.names"
    ]
    assert "everyscope.text.config" in light
    assert not loads_heavy(["everyscope", *light])


def test_public_names_resolve_and_are_documented():
    silent = [name for name in everyscope.__all__ if not getattr(everyscope, name).__doc__]
    assert not silent


def test_type_checkers_see_the_public_names_in_their_homes():
    """The root lists names twice: by home for running, as imports for type checkers."""
    imports = [node for node in ast.walk(TREES[ROOT / "src/everyscope/__init__.py"]) if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names if (node.module or "").startswith("everyscope")}
    assert homes == everyscope._HOMES


def test_public_names_are_those_of_the_lazy_table():
    assert everyscope.__all__ == sorted(everyscope._HOMES) == dir(everyscope)
    assert {"Site", "capture", "load_sae", "load_suite", "splice", "train_saes"} <= set(everyscope.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        everyscope.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="did you mean 'load_sae'"):
        everyscope.load_SAE  # noqa: B018


def test_every_module_stands_on_a_floor():
    floors = " ".join(PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"])
    named = set(floors.replace("(", " ").replace(")", " ").replace("|", " ").split())
    packages = {found.name for found in pkgutil.walk_packages(everyscope.__path__, "everyscope.") if found.ispkg}
    loose = [name for name in module_names() if name not in packages and not any(f"{name}.".startswith(f"{on}.") for on in named)]
    assert not loose, f"add to the layers in pyproject.toml: {loose}"
