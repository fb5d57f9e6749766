"""Trainers as processes of their own, each in the environment of its package; made once, kept in the cache."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from everyscope.base.progress import say
from peers.worker import Settings

TORCH = "torch==2.13.0"
PACKAGES: dict[str, str | None] = {
    "everyscope": None,
    "dense_autograd": None,
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "saelens": "sae-lens==6.54.12",
    "circuit_tracer": "circuit-tracer==0.5.0 nnsight==0.6.1",  # pip alone takes an nnsight that has lost modules it imports
}
"""The trainers, and what is installed for each; None runs in this very environment. circuit_tracer trains nothing: it reads."""
UNWANTED = ("torchvision", "torchaudio")
"""What peers bring along built for another torch, whereupon their `transformers` no longer imports."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def python_of(trainer: str, cache: Path) -> Path:
    """The interpreter that has the trainer's package, in an environment that is made where it is missing."""
    package = PACKAGES[trainer]
    if package is None:
        return Path(sys.executable)
    folder = cache / "environments" / trainer
    python, built = folder / "bin" / "python", folder / "built"
    if not built.exists():
        say(f"  {trainer}: installing {package} and what it needs in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text(f"{TORCH}\n")
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", TORCH, "numpy"], check=True)  # first and alone, so that the build for this machine stays
        subprocess.run([*pip, "install", "--constraint", str(constraints), *package.split()], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
        built.touch()
    return python


class Worker:
    """One trainer's process. It sleeps between questions."""

    def __init__(self, trainer: str, settings: Settings, python: Path, log: Path) -> None:
        """Start it; what its libraries say goes into the file `log`."""
        self.trainer, self.settings, self._log = trainer, settings, log
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(settings.threads))
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-m", f"peers.{trainer}", json.dumps(asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=Path(__file__).parents[1],
                env=environment | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
            )
        self._greeting: dict[str, Any] | None = None

    @property
    def greeting(self) -> dict[str, Any]:
        """The versions that it runs; waits until it is ready."""
        if self._greeting is None:
            self._greeting = self._hear()
        return self._greeting

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer to one question of peers/worker.py."""
        assert self.greeting
        assert self._process.stdin
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        """End it, in good order where it still listens."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        # What libraries print while they are imported comes before the first answer.
        line = next((line for line in self._process.stdout if line.startswith("{")), None)
        if line is None:
            last = self._log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
            raise SystemExit(f"{self.trainer} has ended: {last[0]}; all it said is in {self._log}")
        return json.loads(line)
