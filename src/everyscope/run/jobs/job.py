"""One piece of work, and the same as plain text that another process or host can run.

A job is a module-level function and its config; what it leaves lies on disk, so a job that was killed is simply run again.
Between processes it goes as a `Spec`, which is JSON: the function and the config's class by name, the config by its fields.
Nothing that comes over a wire is unpickled by us.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from everyscope.base.errors import ConfigError
from everyscope.base.ids import content_id
from everyscope.base.schema import Schema, one_line

Progress = Callable[[int], None]
"""Is called with units done."""
Work = Callable[..., Any]
"""A job's function: of its config or, where it can report progress, of its config and a Progress."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
"""Set or not set alike in every job of a run, for sums depend on the number of threads. Ray sets the first by itself."""


class Resources(Schema):
    """What a job takes of the machine that it runs on."""

    cpus: int = Field(default=1, ge=1)
    """Cores, and threads of the job [cores]."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; below 1 a share of one, which others may have the rest of [1]."""
    memory_bytes: int = Field(default=0, ge=0)
    """Memory of the host that is kept for the job; 0 keeps none [bytes]."""


@dataclass(frozen=True)
class Job:
    """One unit of work: a module-level function, its config, and what it takes."""

    work: Work
    config: Any
    name: str = ""
    """What people see, unique among jobs that run together."""
    resources: Resources = field(default_factory=Resources)
    units: int = 0
    """Units that it reports to its Progress in all; 0 where it reports none."""
    cost: float = 0.0
    """Predicted length, in any unit: longer ones begin first [1]."""
    is_service: bool = False
    """Whether it runs beside the others until they are done, and is then asked to stop."""

    def run(self, progress: Progress) -> None:
        """Do the work here; `progress` is called with units, if the function reports them."""
        call(self.work, self.config, progress)


class Spec(Schema):
    """A job as it goes to another process."""

    name: str
    """What people see."""
    work: str
    """The function, as module:name."""
    kind: str
    """The config's class, as module:name."""
    config: dict[str, Any]
    """The config's fields."""
    threads: int = Field(ge=1)
    """Threads that the job computes with [threads]."""
    environment: dict[str, str | None]
    """THREAD_VARIABLES as they are for all jobs of the run; None where one is not set."""
    folder: str
    """The working folder, which paths in the config are relative to."""
    lock: str | None
    """A file that is locked while the job runs, so that two attempts never write together; None takes none."""
    version: str
    """The everyscope that wrote the spec."""


def call(work: Work, config: Any, progress: Progress) -> None:
    """`work` of its config, and of `progress` if it has a second parameter."""
    if len(inspect.signature(work).parameters) > 1:
        work(config, progress)
    else:
        work(config)


def spec_of(job: Job, locks: Path | None) -> Spec:
    """The job as JSON values; its lock lies in the folder `locks`. ConfigError for a function that has no name of its own."""
    kind = type(job.config)
    spec = Spec(
        name=job.name,
        work=_name_of(job.work),
        kind=_name_of(kind),
        config=job.config.as_json(),
        threads=job.resources.cpus,
        environment={name: os.environ.get(name) for name in THREAD_VARIABLES},
        folder=str(Path.cwd()),
        lock=None if locks is None else str(locks.absolute() / f"{content_id([_name_of(job.work), job.config.as_json()])}.lock"),
        version=version("everyscope"),
    )
    assert config_of(spec) == job.config, f"{kind.__name__} does not come back from JSON as it went"
    return spec


def work_of(spec: Spec) -> Work:
    """The function that a spec names; ConfigError where there is none."""
    found = _named(spec.work)
    if not inspect.isfunction(found):
        raise ConfigError(f"{spec.work}: not a module-level function; install the same everyscope on all hosts")
    return found


def config_of(spec: Spec) -> Schema:
    """The config that a spec holds; ConfigError where its class is no config, or its fields are not of it."""
    kind = _named(spec.kind)
    if not (inspect.isclass(kind) and issubclass(kind, Schema)):
        raise ConfigError(f"{spec.kind}: not a config; install the same everyscope on all hosts")
    try:
        return kind.model_validate(spec.config)
    except ValidationError as error:
        raise ConfigError(f"{spec.name}: {one_line(error)}; install the same everyscope on all hosts") from error


def _name_of(thing: Any) -> str:
    name = f"{thing.__module__}:{thing.__qualname__}"
    if not name.replace(":", ".").replace(".", "_").isidentifier() or thing.__module__ == "__main__":
        raise ConfigError(f"{name}: a job's function and config are defined at the top of a module; move it there")
    return name


def _named(name: str) -> Any:
    module, separator, attribute = name.partition(":")
    try:
        if not separator or not attribute.isidentifier():
            raise AttributeError(attribute)
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name}: no such function or config here ({error}); install the same everyscope on all hosts"
        ) from error
