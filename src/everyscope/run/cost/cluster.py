"""What a run takes on a cluster of GPUs: its training groups as a run cuts them, hours, and what holds it up. Torch-free.

Groups are cut by the function that a run cuts them by (`run.placement`), so this is what a run does. Hours are a roofline's, from
the makers' figures or from measured rates. The disk is no limit unless its rate is given; without one the plan says which rate
training needs.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.run.config import RunConfig
from everyscope.run.cost.machine import NUMBER_BYTES
from everyscope.run.cost.prices import depth_of, pass_flop
from everyscope.run.placement import Devices
from everyscope.run.stages import stages_of
from everyscope.train.config import TrainConfig
from everyscope.train.devices import Device, device_of
from everyscope.train.memory import bytes_of, num_sides_of
from everyscope.train.step_time import Load, StepTime, all_reduce_seconds, compute_time, copy_seconds, summed_bytes

CAUSES = ("products", "device memory", "latent sums", "gradient sums", "host to device")
"""What a group's time goes to; the last is waiting for a copy that takes longer than the step."""
CURVE = tuple(1 << power for power in range(11))
"""Numbers of devices of the simulated curve, 1 to 1,024."""


@dataclass(frozen=True)
class Placed:
    """A training group on one kind of device, and when it starts."""

    group: TrainConfig
    d_in: int
    l0: float
    """Of SAEs that aim at none [latents]."""
    row_bytes: int
    """One row on disk [bytes]."""
    device: Device
    start: float = 0.0
    """[s]."""

    @property
    def devices(self) -> int:
        """Devices that it takes, all at once."""
        return self.group.settings.ranks

    @cached_property
    def memory(self) -> int:
        """On each device [bytes]."""
        return bytes_of(self.group, self.d_in)

    @cached_property
    def step(self) -> StepTime:
        """One step of all its SAEs."""
        settings, products = self.group.settings, self.group.products
        total, latents, gradients = StepTime(), 0, 0
        for sae in self.group.saes:
            load = Load.of(
                self.d_in, sae.width, sae.target_l0 or self.l0, settings.batch_rows, settings.latent_shards, settings.replicas,
                len(sae.prefixes), sae.skip,
            )  # fmt: skip
            total += compute_time(load, self.device, products)
            sums = summed_bytes(load, settings.latent_shards, settings.replicas, load.step_kind(products))
            latents, gradients = latents + sums[0], gradients + sums[1]
        rate = self.device.interconnect_bandwidth * self.device.link_share  # a group lies on one host
        return total + StepTime(
            latents=all_reduce_seconds(latents, settings.latent_shards, rate),
            gradients=all_reduce_seconds(gradients, settings.replicas, rate),
        )

    @cached_property
    def copy(self) -> float:
        """A batch's rows to one device, while the step before is computed [s]."""
        rows = self.group.settings.batch_rows // self.group.settings.replicas
        return copy_seconds(rows, num_sides_of(self.group) * self.d_in, self.device)

    @cached_property
    def seconds(self) -> float:
        """From its first step to its last [s]."""
        return self.group.steps * max(self.step.total, self.copy)

    @property
    def read_bytes(self) -> int:
        """Off the disk: shards and replicas on one host share what is in its memory [bytes]."""
        return self.group.num_tokens * self.row_bytes


@dataclass(frozen=True)
class HarvestPlan:
    """One pass of the language model on all devices, each a worker on its own partition of the text."""

    flop: float
    compute_seconds: float
    """Forward passes [s]."""
    devices_per_model: int
    """Devices over which one copy of the model is spread, block by block; only one of them computes at a time."""
    written_bytes: int
    """Shards of all sites [bytes]."""
    write_seconds: float
    """Writing them, at the rate given; 0 where none is [s]."""
    copy_seconds: float
    """Activations from devices to their hosts [s]."""

    @property
    def seconds(self) -> float:
        """The longest of the three, for they overlap [s]."""
        return max(self.compute_seconds, self.write_seconds, self.copy_seconds)


@dataclass(frozen=True)
class ClusterPlan:
    """A run on a cluster."""

    name: str
    device: Device
    devices: int
    placed: tuple[Placed, ...]
    harvest: HarvestPlan
    disk_rate: float | None
    """Of the storage that all hosts share [bytes/s]; None is no limit."""

    @cached_property
    def busy(self) -> float:
        """Devices' time that groups take [device s]."""
        return sum(placed.seconds * placed.devices for placed in self.placed)

    @cached_property
    def compute_seconds(self) -> float:
        """Until the last group ends, on a disk without limit [s]."""
        return max(placed.start + placed.seconds for placed in self.placed)

    @cached_property
    def read_bytes(self) -> int:
        """Off the disk for all groups, each by itself [bytes]."""
        return sum(placed.read_bytes for placed in self.placed)

    @property
    def train_seconds(self) -> float:
        """Training all groups, or the disk's time where it takes longer [s]."""
        return max(self.compute_seconds, self.read_bytes / self.disk_rate if self.disk_rate else 0.0)

    @property
    def seconds(self) -> float:
        """Harvest, then training [s]."""
        return self.harvest.seconds + self.train_seconds

    @cached_property
    def shares(self) -> dict[str, float]:
        """Where the devices' time goes while SAEs train; adds up to 1."""
        causes: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        for placed in self.placed:
            times, weight = placed.step, placed.group.steps * placed.devices
            waited = max(0.0, placed.copy - times.total)
            for cause, part in zip(CAUSES, (*times.parts, waited), strict=True):
                causes[cause] += part * weight
        causes["disk"] = (self.train_seconds - self.compute_seconds) * self.devices
        causes["idle"] = self.compute_seconds * self.devices - self.busy
        total = sum(causes.values())
        return {cause: part / total for cause, part in causes.items()}

    @property
    def bottleneck(self) -> str:
        """What takes the largest share of the devices' time while SAEs train."""
        return max(self.shares, key=lambda cause: self.shares[cause])

    @property
    def needed_disk_rate(self) -> float:
        """What the disk must give so that no device waits for it, on average over the training [bytes/s]."""
        return self.read_bytes / self.compute_seconds


def cluster_plan(
    config: RunConfig, devices: int, gpu: str, *, utilisation: float | None = None, disk_gbps: float | None = None
) -> ClusterPlan:
    """The run on `devices` devices of the kind `gpu`: a name, or a JSON file of rates.

    `utilisation` is a measured model FLOP utilisation [1], `disk_gbps` the rate of the shared storage [10^9 bytes/s]. ConfigError
    for a kind that is not known, numbers out of range, and an SAE that does not fit.
    """
    if devices < 1:
        raise ConfigError(f"--gpus {devices}: expected 1 or more")
    if disk_gbps is not None and not (disk_gbps > 0 and math.isfinite(disk_gbps)):
        raise ConfigError(f"--disk-gbps {disk_gbps:g}: expected a rate above 0")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ConfigError(f"--mfu {utilisation:g}: expected a share above 0 and at most 1, as 0.5")
    device = device_of(gpu)
    if utilisation is not None:
        device = device.model_copy(update={"utilisation": utilisation})
    disk_rate = None if disk_gbps is None else disk_gbps * 1e9
    config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cuda"})})
    found = Devices(device.memory_bytes, min(devices, device.devices_per_host), devices, device.name)
    stages = stages_of(config, Path(), found)
    l0, size = config.canonical_l0, NUMBER_BYTES[config.harvest.dtype]
    groups = [Placed(group, stages.d_in(group), l0, size * stages.d_in(group), device) for group in stages.parts[0].train]
    harvest = _harvest_plan(config, device, devices, disk_rate)
    return ClusterPlan(config.name, device, devices, tuple(scheduled(groups, devices)), harvest, disk_rate)


def scheduled(groups: Sequence[Placed], devices: int) -> list[Placed]:
    """When each group starts: longest first, whenever a host has devices enough that are free."""
    per_host = groups[0].device.devices_per_host
    free = [min(per_host, devices - first) for first in range(0, devices, per_host)]
    running: list[tuple[float, int, int]] = []
    waiting, placed, now = sorted(groups, key=lambda group: -group.seconds), [], 0.0
    while waiting:
        left = []
        for group in waiting:
            host = min((number for number, count in enumerate(free) if count >= group.devices), key=lambda n: free[n], default=-1)
            if host < 0:
                left.append(group)
                continue
            free[host] -= group.devices
            placed.append(Placed(group.group, group.d_in, group.l0, group.row_bytes, group.device, now))
            heapq.heappush(running, (now + group.seconds, host, group.devices))
        waiting = left
        if waiting:
            now = running[0][0]
            while running and running[0][0] <= now:
                _, host, count = heapq.heappop(running)
                free[host] += count
    return placed


def _harvest_plan(config: RunConfig, device: Device, devices: int, disk_rate: float | None) -> HarvestPlan:
    rows = max(config.tokens_of(site) for site in config.all_places)  # one pass of the model writes every site
    numbers = rows * sum(config.sizes.d_in(site) for site in config.all_places)
    parameters, made_in = config.sizes.num_parameters, NUMBER_BYTES[config.model.dtype]
    size = max(1, math.ceil(parameters * made_in / (device.memory_bytes * device.usable_memory)))
    rate = device.bfloat16_rate if config.model.dtype == "bfloat16" else device.float32_rate
    models = devices // size
    if not models:
        raise ConfigError(
            f"the model's {human_bytes(parameters * made_in)} do not fit {devices} {device.name}; plan for {size} or more --gpus"
        )
    depth = max(depth_of(site) for site in config.all_places)
    flop = rows * pass_flop(config.sizes, 0, depth, logits=False)
    written = numbers * NUMBER_BYTES[config.harvest.dtype]
    return HarvestPlan(
        flop=flop,
        compute_seconds=flop / (rate * models),
        devices_per_model=size,
        written_bytes=written,
        write_seconds=written / disk_rate if disk_rate else 0.0,
        copy_seconds=numbers * made_in / (device.host_rate * models),
    )


def curve(config: RunConfig, gpu: str, counts: Sequence[int] = CURVE, **rates: float | None) -> list[dict[str, Any]]:
    """Plans for several numbers of devices: hours, speed-up and what holds each up. Those that do not hold an SAE are left out.

    Speed-up is of harvest and training together, against the least number that fits, which is taken to use its devices fully.
    """
    lines: list[dict[str, Any]] = []
    for count in counts:
        try:
            plan = cluster_plan(config, count, gpu, **rates)
        except ConfigError:
            if lines or count == max(counts):
                raise
            continue
        first = lines[0] if lines else {"devices": count, "hours": plan.seconds / 3600}
        speed_up = first["hours"] / (plan.seconds / 3600) * first["devices"]
        lines.append(
            {
                "devices": count,
                "hours": plan.seconds / 3600,
                "harvest_hours": plan.harvest.seconds / 3600,
                "speed_up": speed_up,
                "efficiency": speed_up / count,
                "bottleneck": plan.bottleneck,
                "shares": plan.shares,
                "needed_disk_bytes_per_second": plan.needed_disk_rate,
                "groups": len(plan.placed),
                "most_shards": max(placed.group.settings.latent_shards for placed in plan.placed),
            }
        )
    return lines
