"""The tutorials run: their blocks of code in order, in one folder, as a reader would type them.

Assertions are the tutorials' own. A later page may use what an earlier one has saved.
"""

import re
import shlex
from pathlib import Path

import pytest

from everyscope.cli.main import main

TUTORIALS = Path(__file__).parents[2] / "docs/tutorials"
ORDER = ("train_an_sae.md", "folder_to_suite.md", "steer.md")
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> None:
    """Every block of a page; Python shares one namespace, commands must succeed."""
    names: dict[str, object] = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            line = text[: block.start(2)].count("\n")
            exec(compile("\n" * line + block[2], str(page), "exec"), names)
            continue
        for command in block[2].splitlines():
            name, *words = shlex.split(command, comments=True)
            assert name == "everyscope", f"{page.name}: a test runs everyscope alone, not {command}"
            main(words)


def test_the_tutorials_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert {page.name for page in TUTORIALS.glob("*.md")} == set(ORDER)
    monkeypatch.chdir(tmp_path)
    for name in ORDER:
        run_page(TUTORIALS / name)
