"""What all workers share: one trainer behind a process that answers questions, a JSON object a line, on its standard input.

    {"steps": n}        train n steps            -> {"seconds": [...], "peak_bytes": ...}
    {"set_l0": l0}      steer to that L0         -> {"l0": ...}
    {"evaluate": true}  look at held-out rows    -> {"l0": ..., "fvu": ..., "dead_fraction": ...}
    {"product": n}      the encoder product      -> {"float32": [...], "bfloat16": [...]} [s]

A worker runs in the environment of its peer, so this file needs numpy and torch alone. All trainers get the same batches
in the same order, scaled to unit mean squared norm, massive rows included; what a trainer does about these is its own matter.
Held-out rows are the usual ones alone: otherwise a handful of massive rows decides the FVU. Between questions a worker sleeps.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

HELD_OUT_ROWS = 8192
SCALE_ROWS = 65536
"""Training rows from which the scale is taken [rows]."""
CHUNK_ROWS = 1024
MASSIVE = 8.0
"""Held-out rows above this many times the training rows' median norm are not measured [1]."""
STEERING_ROWS = 2048
"""Held-out rows on which a threshold is chosen [rows]."""


@dataclass(frozen=True)
class Settings:
    """One trainer's task."""

    data: str
    """A .npy file, float32 [rows, d_in], shuffled, its last HELD_OUT_ROWS held out unless `held_out` is given."""
    held_out: str | None
    """A .npy file of rows of other documents, of which the first HELD_OUT_ROWS are measured."""
    width: int
    """Latents."""
    batch: int
    """Rows in a batch [rows]."""
    steps: int
    """Length of the run, which the trainers' schedules need [steps]."""
    l0: float
    """Latents wanted on a row [latents]."""
    threads: int
    seed: int
    knobs: dict[str, float]
    """Settings of this trainer's own, such as its sparsity coefficient."""


class Trainer(Protocol):
    """One SAE in training, on rows of unit mean squared norm."""

    def step(self, rows: Tensor) -> None:
        """One update, as the trainer's own loop does it."""
        ...

    def reconstruct(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions [batch, d_in] and latents, which are active where they are not 0 [batch, d_sae]."""
        ...

    def set_l0(self, l0: float, rows: Tensor) -> None:
        """Make about `l0` latents active on an average row."""
        ...


class Rows:
    """The array: its batches and its held-out rows, scaled."""

    def __init__(self, path: str, held_out: str | None = None) -> None:
        """Measure the scale, on the first training rows."""
        self._path = path
        table = np.load(path, mmap_mode="r")
        self.num_training, self.d_in = len(table) - (0 if held_out else HELD_OUT_ROWS), table.shape[1]
        sample = np.square(table[: min(SCALE_ROWS, self.num_training)], dtype=np.float64).sum(1)
        self.scale = float(np.sqrt(sample.mean()))
        others = self._read(held_out, 0, HELD_OUT_ROWS) if held_out else self._read(path, self.num_training, len(table))
        self.held_out = others[others.norm(dim=1) <= MASSIVE * float(np.sqrt(np.median(sample))) / self.scale]

    def _read(self, path: str, start: int, stop: int) -> Tensor:
        # Mapped again each time: pages that stay mapped would count as the trainer's memory.
        return torch.from_numpy(np.load(path, mmap_mode="r")[start:stop] / np.float32(self.scale))

    def training(self) -> Tensor:
        """All training rows, scaled."""
        return self._read(self._path, 0, self.num_training)

    def batch(self, step: int, rows: int) -> Tensor:
        """Batch `step`; the rows lie shuffled, so that reading in order is reading at random."""
        start = step % (self.num_training // rows) * rows
        return self._read(self._path, start, start + rows)


def threshold_for(pre: Tensor, l0: float) -> float:
    """The one threshold that on average `l0` of a row's pre-activations [batch, d_sae] exceed."""
    above = max(round(l0 * len(pre)), 1)
    return max(float(pre.flatten().kthvalue(pre.numel() - above).values), 0.0)


@torch.no_grad()
def evaluate(trainer: Trainer, rows: Tensor) -> dict[str, float]:
    """L0, fraction of variance unexplained about the mean of `rows`, and share of latents silent on all of them."""
    error, firings = 0.0, torch.zeros(1, dtype=torch.int64)
    for x in rows.split(CHUNK_ROWS):
        x_hat, f = trainer.reconstruct(x)
        error += float((x_hat.double() - x.double()).square().sum())
        firings = firings + (f != 0).sum(0)
    total = float((rows.double() - rows.double().mean(0)).square().sum())
    silent = int((firings == 0).sum()) / len(firings)
    return {"l0": int(firings.sum()) / len(rows), "fvu": error / total, "dead_fraction": silent}


def product_seconds(rows: Tensor, width: int, count: int) -> dict[str, list[float]]:
    """How long the encoder's product [batch, d_in] x [d_in, d_sae] alone takes in both number formats [s]."""
    seconds: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = rows.to(dtype), torch.randn(width, rows.shape[1]).to(dtype)
        out = torch.empty(len(rows), width, dtype=dtype)
        times = [timed(lambda x=x, w=w, out=out: torch.mm(x, w.T, out=out)) for _ in range(count + 1)]
        seconds[str(dtype).removeprefix("torch.")] = times[1:]  # the first one packs and compiles
    return seconds


def timed(call: Callable[[], Any]) -> float:
    """How long `call` takes [s]."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reset_peak_memory() -> None:
    """Reset the peak of this process's memory (Linux)."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The peak of this process's resident memory since its last reset [bytes]; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Session:
    """The answers of one worker."""

    def __init__(self, settings: Settings, trainer: Trainer, rows: Rows) -> None:
        """Nothing has been trained yet."""
        self._settings, self._trainer, self._rows, self._done = settings, trainer, rows, 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked; the keys are those of this file's first lines."""
        ((name, value),) = question.items()
        return {"steps": self._steps, "set_l0": self._set_l0, "evaluate": self._evaluate, "product": self._product}[name](value)

    def _steps(self, count: int) -> dict[str, Any]:
        reset_peak_memory()
        seconds = []
        for _ in range(count):
            batch = self._rows.batch(self._done, self._settings.batch)
            seconds.append(timed(lambda batch=batch: self._trainer.step(batch)))
            self._done += 1
        return {"seconds": seconds, "peak_bytes": peak_memory()}

    def _set_l0(self, l0: float) -> dict[str, Any]:
        with torch.no_grad():
            self._trainer.set_l0(l0, self._rows.held_out[:: max(1, len(self._rows.held_out) // STEERING_ROWS)])
        return {"l0": l0}

    def _evaluate(self, _: bool) -> dict[str, Any]:
        return evaluate(self._trainer, self._rows.held_out)

    def _product(self, count: int) -> dict[str, Any]:
        return product_seconds(self._rows.batch(0, self._settings.batch), self._settings.width, count)


def serve(make: Callable[[Settings, Rows], Trainer], package: str) -> None:
    """Answer on standard output until standard input ends. First a greeting with the versions; `package` is the trainer's."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output; that goes to standard error
    settings = Settings(**json.loads(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    rows = Rows(settings.data, settings.held_out)
    session = Session(settings, make(settings, rows), rows)
    print(json.dumps({"version": version(package), "torch": torch.__version__, "scale": rows.scale}), file=answers)
    for line in sys.stdin:
        print(json.dumps(session.answer(json.loads(line))), file=answers)
