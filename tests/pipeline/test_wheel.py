"""The wheel that users install, in an environment of its own and far from the checkout: nothing is missing from it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNWANTED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", "*.nbi", "*.nbc")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for building writes beside the sources."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT / "src", folder / "src", ignore=UNWANTED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder)]
    subprocess.run(pip, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; what it depends on is read from this one, in which no checkout is seen."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A plain path: the .pth files in it, the editable install of the checkout among them, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(environment: Path, *command: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = (str(environment / "bin" / command[0]), *command[1:])
    done = subprocess.run(command, cwd=environment.parent, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_sources(wheel: Path):
    ignored = UNWANTED
    want = set()
    for folder, folders, names in os.walk(ROOT / "src"):
        left_out = ignored(folder, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        want |= {Path(folder, name).relative_to(ROOT / "src").as_posix() for name in names if name not in left_out}
    with zipfile.ZipFile(wheel) as archive:
        got = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert got == want


def test_commands_run_without_the_checkout(environment: Path):
    assert "harvest" in run(environment, "everyscope", "--help")
    assert "--port" in run(environment, "everyscope", "browse", "--help")
    assert json.loads(run(environment, "everyscope", "plan", "tiny", "--json", "--teraflops", "1", "--disk-gbps", "1"))["saes"]
    where = "import everyscope, importlib.metadata as m; print(everyscope.__file__, m.version('everyscope'))"
    assert str(environment) in run(environment, "python", "-c", where)


def test_the_bundled_model_is_in_it(environment: Path):
    code = "import everyscope; print(everyscope.load_language_model(everyscope.ModelConfig(name='tiny')).model.config.model_type)"
    assert run(environment, "python", "-c", code) == "gemma2\n"
