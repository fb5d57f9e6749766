"""Every stage's config, derived from a run's config once, before the first byte is written. Torch-free.

`plan`, `run --dry-run`, `run` and the stages by themselves hold the same `Stages`: what one prints, another does. Deriving them
raises what any stage's config would object to.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.base.errors import ConfigError
from everyscope.base.schema import one_line
from everyscope.describe.config import DescribeConfig
from everyscope.describe.explanations.config import ExplainConfig
from everyscope.evaluate.comparisons.config import ComparisonConfig
from everyscope.evaluate.config import EvaluateConfig
from everyscope.publish.config import PublishConfig
from everyscope.run.config import RunConfig
from everyscope.run.placement import Devices, placed
from everyscope.train.config import TrainConfig

RECIPE_FILE = "recipe.json"
"""The resolved config of a run, in its folder."""


@dataclass(frozen=True)
class ModelPart:
    """What makes SAEs of one model: the run itself, or one of its controls."""

    config: RunConfig
    folder: Path
    harvest: HarvestConfig
    train: tuple[TrainConfig, ...]
    """Training groups as they are trained, cut to the devices."""
    evaluate: EvaluateConfig


@dataclass(frozen=True)
class Stages:
    """A run, stage by stage."""

    config: RunConfig
    out: Path
    """The run's folder."""
    devices: Devices | None
    """The GPUs that training groups are cut to; None where they are not known."""
    servers: "ActivationSource | None"
    """Where training reads from in place of the run's own shards."""
    parts: tuple[ModelPart, ...]
    """The run itself, then controls that train SAEs of their own."""
    comparisons: tuple[ComparisonConfig, ...]
    describe: DescribeConfig
    explain: ExplainConfig
    publish: PublishConfig

    @property
    def groups(self) -> list[TrainConfig]:
        """All training groups."""
        return [group for part in self.parts for group in part.train]

    def d_in(self, group: TrainConfig) -> int:
        """The size of a group's activations; controls have the sizes of the run's own model."""
        return self.config.sizes.d_in(group.site)

    def as_json(self) -> dict[str, Any]:
        """Every config as plain JSON values."""
        return {
            "out": str(self.out),
            "harvest": [part.harvest.as_json() for part in self.parts],
            "train": [group.as_json() for group in self.groups],
            "evaluate": [part.evaluate.as_json() for part in self.parts],
            "compare": [comparison.as_json() for comparison in self.comparisons],
            "describe": self.describe.as_json(),
            "explain": self.explain.as_json(),
            "publish": self.publish.as_json(),
        }


@dataclass(frozen=True)
class ActivationSource:
    """Where training reads from in place of the run's own shards."""

    source: str | None = None
    """Addresses of activation servers, flight://HOST:PORT; None reads the run's own shards."""
    order: Literal["fixed", "any"] = "fixed"
    tls_roots: Path | None = None


def stages_of(
    config: RunConfig,
    out: Path,
    devices: Devices | None = None,
    *,
    servers: ActivationSource | None = None,
    harvests: bool = True,
) -> Stages:
    """Every stage of a run in `out`, its training groups cut to `devices`; None leaves them as the config has them.

    Where the run no longer `harvests`, as a stage by itself, the evaluation reads shards only if there are any. ConfigError, with
    the field, for whatever a stage would refuse, and for SAEs that fit no host.
    """
    where = servers or ActivationSource()
    try:
        parts = []
        for part, folder in config.parts(out):
            groups = part.train_configs(folder, where.source, where.order, where.tls_roots)
            parts.append(
                ModelPart(
                    config=part,
                    folder=folder,
                    harvest=part.harvest_config(folder),
                    train=tuple(placed(groups, lambda group, part=part: part.sizes.d_in(group.site), devices)),
                    evaluate=part.evaluate_config(folder, harvests or (folder / "shards").is_dir()),
                )
            )
        return Stages(
            config=config,
            out=out,
            devices=devices,
            servers=servers,
            parts=tuple(parts),
            comparisons=tuple(config.comparison_configs(out, harvests or (out / "shards").is_dir())),
            describe=config.describe_config(out),
            explain=config.explain_config(out),
            publish=config.publish_config(out),
        )
    except ValidationError as error:
        raise ConfigError(one_line(error)) from error
