"""What may be installed: nothing whose bytes are not those that were tested, and no release with a hole that is known."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ]+)(?: ; [^\\\n]+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", re.MULTILINE)
FIXED = {
    "jinja2": "3.1.6",  # a template leaves its sandbox: CVE-2025-27516; chat templates are of anybody's models
    "starlette": "0.49.1",  # a Range header takes quadratic time: CVE-2025-62727
    "transformers": "4.53",  # names and configs that regular expressions take for ever over
    "h11": "0.16",  # chunks that proxies read otherwise: CVE-2025-43859
}
"""By package the first release without the hole."""


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_every_package_of_the_lock_has_its_hashes():
    text = (ROOT / "requirements.lock").read_text()
    found = PINNED.findall(text)
    assert len(found) == len(re.findall(r"^[A-Za-z0-9]", text, re.MULTILINE)) > 50
    assert all(hashes for _, _, hashes in found)
    assert "pip install --require-hashes" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(("name", "version"), FIXED.items())
def test_releases_with_known_holes_are_excluded(name: str, version: str):
    """By what an installation of ours requires, and by what is tested."""
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = [bound for one in required for bound in re.findall(rf"^{name}>=([0-9.]+)", one)]
    pinned = {package.lower(): pin for package, pin, _ in PINNED.findall((ROOT / "requirements.lock").read_text())}
    assert [numbers(bound) >= numbers(version) for bound in bounds] == [True]
    assert numbers(pinned[name]) >= numbers(version)
