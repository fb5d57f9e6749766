"""docs/troubleshooting.md cannot rot: its commands and lines of Python run here, and print what the page says they print."""

import re
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from everyscope.base.bundled import BUNDLED_FOLDER
from everyscope.cli.main import main

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
BLOCK = re.compile(r"^(<!-- (?P<only>.+) -->\n)?```(?P<kind>console|pycon)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
ANY = "…"
"""Stands for what differs between machines."""


def blocks(kind: str) -> list[str]:
    """The page's blocks of a kind, without those that need a machine unlike this one."""
    found = [match for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if match["kind"] == kind]
    return [match["body"] for match in found if not (match["only"] == "without CUDA" and torch.cuda.is_available())]


def is_like(said: str, shown: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, shown.split(ANY))), said) is not None


def test_commands_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(BUNDLED_FOLDER / "tiny", "my_model")
    Path("my_text.txt").write_text("def first(items):\n    return items[0]\n")
    wrong, commands = [], 0
    for line in "".join(blocks("console")).splitlines():
        if not line.startswith("$ "):
            said = next((one for one in reversed(capsys.readouterr().err.splitlines()) if one.startswith("everyscope: ")), "")
            if not is_like(said, line):
                wrong.append(f"the page shows {line!r}, the command prints {said!r}")
            continue
        capsys.readouterr()
        name, *words = shlex.split(line.removeprefix("$ "))
        if name != "everyscope":
            subprocess.run(line.removeprefix("$ "), shell=True, check=True)
            continue
        commands += 1
        with suppress(SystemExit):
            main(words)
    assert commands >= 12
    assert not wrong, "\n".join(wrong)


def test_lines_of_python_raise_what_the_page_shows():
    names: dict[str, Any] = {}
    raised, wrong, statements = "", [], 0
    for line in "".join(blocks("pycon")).replace("\n... ", "\0").splitlines():  # a statement and what continues it
        if line.startswith(">>> "):
            if raised:
                wrong.append(f"the page does not show {raised!r}")
            raised, statements = "", statements + 1
            try:
                exec(line.removeprefix(">>> ").replace("\0", "\n"), names)
            except Exception as error:
                raised = f"{type(error).__name__}: {error}"
        else:
            if not is_like(raised, line):
                wrong.append(f"the page shows {line!r}, Python raises {raised!r}")
            raised = ""
    assert statements >= 8
    assert not wrong, "\n".join(wrong)
