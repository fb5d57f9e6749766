"""How training groups are cut to the GPUs that there are: by SAEs, then by latents. Torch-free.

SAEs of a site train together because they read the same batches, and need nothing of one another: a group that does not fit a
GPU is split. One SAE that does not fit alone is sharded: its latents lie on several GPUs of one host. What a group is named after
is what it trains, so an SAE comes out the same however it was grouped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.run.config import UNAIMED_L0
from everyscope.sae.config import SaeConfig
from everyscope.train.config import TrainConfig, TrainSettings
from everyscope.train.devices import H100
from everyscope.train.memory import CONTEXT_BYTES, USABLE, bytes_of, group_bytes, num_sides_of
from everyscope.train.step_time import Load, compute_time

LEAST_SHARD = 2**12
"""An SAE is sharded to save time, and not for want of memory, only as long as each shard keeps this many latents: a narrower one
spends its time on sums between GPUs [latents]."""


@dataclass(frozen=True)
class Devices:
    """The GPUs that a run may train on."""

    memory_bytes: int
    """Memory of the smallest [bytes]."""
    per_host: int
    """On each host, over which one SAE may be sharded [devices]."""
    count: int | None = None
    """In all, among which groups are divided so that none waits for the longest; None only makes them fit [devices]."""
    name: str = "GPU"
    """What they are called, for people."""

    @property
    def usable_bytes(self) -> int:
        """What training may take of each [bytes]."""
        return int(USABLE * self.memory_bytes) - CONTEXT_BYTES


WidthOf = Callable[[TrainConfig], int]
"""The size of a group's activations, d_in."""


def placed(groups: Sequence[TrainConfig], d_in_of: WidthOf, devices: Devices | None) -> list[TrainConfig]:
    """The groups as they train on `devices`: what fits stays as it is, the rest is split and sharded; ConfigError where one SAE
    fits no host. Groups on the CPU, and groups for devices of unknown size (None), stay as they are.
    """
    if devices is None:
        return list(groups)
    fitted = [part for group in groups for part in (_fitted(group, d_in_of(group), devices) if _on_gpu(group) else [group])]
    return fitted if devices.count is None else _split_over_devices(fitted, d_in_of, devices)


def group_work(group: TrainConfig, d_in: int) -> float:
    """How long a group takes, in units that only compare groups of one kind of device: on a GPU the seconds of an H100, by its
    roofline; on a CPU rows x inputs x latents.
    """
    settings = group.settings
    if not _on_gpu(group):
        return float(group.num_tokens) * d_in * sum(sae.width for sae in group.saes) / settings.ranks
    sizes = settings.batch_rows, settings.latent_shards, settings.replicas
    loads = [
        Load.of(d_in, sae.width, sae.target_l0 or UNAIMED_L0, *sizes, prefixes=len(sae.prefixes), has_skip=sae.skip)
        for sae in group.saes
    ]
    return group.steps * sum(compute_time(load, H100, group.products).total for load in loads)


def _fitted(group: TrainConfig, d_in: int, devices: Devices) -> list[TrainConfig]:
    """The group in as few parts as fit, its widest SAEs first."""
    if bytes_of(group, d_in) <= devices.usable_bytes:
        return [group]
    parts: list[TrainConfig] = []
    for sae in sorted(group.saes, key=lambda sae: -sae.width):
        settings = _settings_for(group, sae, d_in, devices)
        both = (*parts[-1].saes, sae) if parts and parts[-1].settings == settings else None
        if both is not None and group_bytes(both, d_in, settings, num_sides_of(group)) <= devices.usable_bytes:
            parts[-1] = parts[-1].model_copy(update={"saes": both})
        else:
            parts.append(group.model_copy(update={"saes": (sae,), "settings": settings}))
    return parts


def _settings_for(group: TrainConfig, sae: SaeConfig, d_in: int, devices: Devices) -> TrainSettings:
    """The group's settings with as few shards as one of its SAEs needs by itself; ConfigError where a host has too few GPUs."""
    most = min(devices.per_host // group.settings.replicas, sae.width)
    for settings in _sharded(group.settings, most):
        if group_bytes((sae,), d_in, settings, num_sides_of(group)) <= devices.usable_bytes:
            return settings
    needs = group_bytes((sae,), d_in, group.settings, num_sides_of(group))
    on = "" if group.settings.ranks == 1 else f" on each of {group.settings.ranks}"
    raise ConfigError(
        f"{group.site}: one SAE of width {sae.width} needs {human_bytes(needs)}{on}, and a {devices.name} may give "
        f"{human_bytes(max(0, devices.usable_bytes))} of {human_bytes(devices.memory_bytes)} "
        f"({devices.per_host} on a host); {_remedy(group, sae, d_in, devices)}"
    )


def _remedy(group: TrainConfig, sae: SaeConfig, d_in: int, devices: Devices) -> str:
    """What would make one SAE fit: more GPUs on a host, or smaller batches, with its memory then."""
    found = []
    for settings in _sharded(group.settings, sae.width):
        needs = group_bytes((sae,), d_in, settings, num_sides_of(group))
        if needs <= devices.usable_bytes:
            found.append(f"train on a host with {settings.ranks} GPUs ({human_bytes(needs)} on each)")
            break
    for power in range((group.settings.batch_rows - 1).bit_length() - 1, 6, -1):
        settings = group.settings.model_copy(update={"batch_rows": 1 << power})
        needs = group_bytes((sae,), d_in, settings, num_sides_of(group))
        if needs <= devices.usable_bytes:
            found.append(f"set --train.batch-rows {settings.batch_rows} ({human_bytes(needs)})")
            break
    return ", or ".join([*found, "lower groups.N.widths"])


def _sharded(settings: TrainSettings, most: int) -> list[TrainSettings]:
    """The settings with their shards, twice as many, and so on up to `most`."""
    counts = [settings.latent_shards << power for power in range(max(1, most).bit_length())]
    return [
        settings.model_copy(update={"latent_shards": count})
        for count in counts
        if count == settings.latent_shards or count <= most
    ]


def _split_over_devices(groups: list[TrainConfig], d_in_of: WidthOf, devices: Devices) -> list[TrainConfig]:
    """The groups, the longest of them halved until it takes no more than an equal share of all devices' time, or cannot be."""
    assert devices.count is not None
    groups, done = list(groups), []
    total = sum(group_work(group, d_in_of(group)) * group.settings.ranks for group in groups)
    while groups:
        longest = max(groups, key=lambda group: group_work(group, d_in_of(group)))
        if group_work(longest, d_in_of(longest)) <= total / devices.count:
            break
        groups.remove(longest)
        parts = _halves(longest, devices) if _on_gpu(longest) else [longest]
        (done if parts == [longest] else groups).extend(parts)
    return done + groups


def _halves(group: TrainConfig, devices: Devices) -> list[TrainConfig]:
    """The group in two by SAEs or, of one SAE, on twice as many GPUs of a host; the same where neither is worth it."""
    if len(group.saes) > 1:
        parts: list[list[SaeConfig]] = [[], []]
        for sae in sorted(group.saes, key=lambda sae: -sae.width):
            min(parts, key=lambda part: sum(one.width for one in part)).append(sae)
        return [group.model_copy(update={"saes": tuple(part)}) for part in parts]
    shards = 2 * group.settings.latent_shards
    most = min(devices.per_host, devices.count or devices.per_host)
    if shards * group.settings.replicas > most or max(sae.width for sae in group.saes) // shards < LEAST_SHARD:
        return [group]
    return [group.model_copy(update={"settings": group.settings.model_copy(update={"latent_shards": shards})})]


def _on_gpu(group: TrainConfig) -> bool:
    return group.settings.device.partition(":")[0] == "cuda"
