"""Where training metrics go besides metrics.jsonl: Weights & Biases and TensorBoard, both optional and off by default."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from everyscope.base.errors import ConfigError
from everyscope.base.extras import import_extra
from everyscope.train.config import SINKS, SinkName

PROJECT = "everyscope"
"""The project of runs at Weights & Biases unless WANDB_PROJECT names one."""


class Sink(Protocol):
    """Takes the rows of `losses_row`."""

    def write(self, row: dict[str, Any]) -> None:
        """Report one row."""
        ...

    def close(self) -> None:
        """Hand over what is still here."""
        ...


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names that sinks show them by, metric first: `l0/width_4096_l0_50_seed_0`."""
    return {f"{name}/{row['sae']}": value for name, value in row.items() if name not in ("step", "sae") and value is not None}


class WandbSink:
    """One run at Weights & Biases. In a process that has one already, its metrics go there, and it stays open."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path) -> None:
        """MissingExtra without the package; who is logged in, and whether offline, is as its own settings say."""
        wandb: Any = import_extra("wandb", "wandb", "reporting to wandb")
        self._is_own = wandb.run is None
        if self._is_own:
            project = os.environ.get("WANDB_PROJECT", PROJECT)
            self._run = wandb.init(project=project, name=name, config=config, dir=str(folder))
            # A step of ours rather than of its own count: rows of several SAEs share one, and a resumed run repeats some.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        else:
            self._run = wandb.run

    def write(self, row: dict[str, Any]) -> None:
        """Report one row."""
        self._run.log({"step": row["step"], **scalars(row)})

    def close(self) -> None:
        """Finish the run, where it is ours."""
        if self._is_own:
            self._run.finish()


class TensorBoardSink:
    """Event files in a folder of their own."""

    def __init__(self, name: str, config: dict[str, Any], folder: Path, num_steps_done: int = 0) -> None:
        """MissingExtra without the package; of a resumed run, steps after `num_steps_done` are hidden and written again."""
        import_extra("tensorboard", "tensorboard", "reporting to tensorboard")
        writer: Any = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder / name.replace(" ", "_").replace("/", "_")), purge_step=num_steps_done + 1)
        self._writer.add_text("config", f"```\n{config}\n```")

    def write(self, row: dict[str, Any]) -> None:
        """Report one row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()


@contextmanager
def opened_sinks(
    names: SinkName | Sequence[SinkName], run: str, config: dict[str, Any], folder: Path, num_steps_done: int = 0
) -> Iterator[list[Sink]]:
    """The sinks of these names for a run, closed at the end; ConfigError for another name, MissingExtra where one is missing."""
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for name in [names] if isinstance(names, str) else names:
            match name:
                case "wandb":
                    sinks.append(WandbSink(run, config, folder))
                case "tensorboard":
                    sinks.append(TensorBoardSink(run, config, folder / "tensorboard", num_steps_done))
                case _:
                    raise ConfigError(f"report_to={name!r}: expected {' or '.join(SINKS)}")
            stack.callback(sinks[-1].close)
        yield sinks
