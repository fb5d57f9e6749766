"""What a recipe takes on a cluster: its banks placed, hours, bytes over each link and what holds it up. Torch-free.

Everything is simulated from the makers' figures, or from rates that somebody measured and gives. The disk is no limit unless its
rate is given; without one the plan says which rate training needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.cost.devices import Device, device_of
from everyscope.cost.machine import FLOP_PER_MODEL_PARAMETER, NUMBER_BYTES
from everyscope.cost.pieces import Bank, Piece, PlannedCode
from everyscope.cost.place import Placement, place
from everyscope.run.config import RunConfig

CAUSES = ("products", "device memory", "latent sums", "gradient sums", "host to device")
"""What a piece's time goes to; the last is waiting for a copy that takes longer than the step."""
CURVE = tuple(1 << power for power in range(11))
"""Numbers of devices of the simulated curve, 1 to 1,024."""


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
        """The longest of the three, for they go on side by side [s]."""
        return max(self.compute_seconds, self.write_seconds, self.copy_seconds)


@dataclass(frozen=True)
class ClusterPlan:
    """A recipe on a cluster."""

    name: str
    device: Device
    placement: Placement
    harvest: HarvestPlan
    disk_rate: float | None
    """Of the storage that all hosts share [bytes/s]; None is no limit."""

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.placement.devices

    @property
    def pieces(self) -> list[Piece]:
        """What is placed."""
        return [placed.piece for placed in self.placement.placed]

    @cached_property
    def shared_read_bytes(self) -> int:
        """Off the disk while SAEs train, where all pieces of a bank share each read, as from a server [bytes]."""
        banks = {(piece.bank.site, piece.bank.num_tokens): piece.bank for piece in self.pieces}
        return sum(bank.num_tokens * bank.row_bytes for bank in banks.values())

    @property
    def train_seconds(self) -> float:
        """The placement's time, or the disk's where it takes longer [s]."""
        return self.placement.seconds_from(self.disk_rate)

    @property
    def seconds(self) -> float:
        """Harvest, then training [s]."""
        return self.harvest.seconds + self.train_seconds

    @cached_property
    def shares(self) -> dict[str, float]:
        """Where the devices' time goes while SAEs train; adds up to 1."""
        causes: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        for piece in self.pieces:
            times, weight = piece.step, piece.bank.steps * piece.devices
            waited = max(0.0, piece.copy - times.total)
            parts = (times.products, times.traffic, times.latents, times.gradients, waited)
            for cause, part in zip(CAUSES, parts, strict=True):
                causes[cause] += part * weight
        causes["disk"] = (self.train_seconds - self.placement.seconds) * self.devices
        causes["idle"] = self.placement.seconds * self.devices - self.placement.busy
        total = sum(causes.values())
        return {cause: part / total for cause, part in causes.items()}

    @property
    def bottleneck(self) -> str:
        """What takes the largest share of the devices' time while SAEs train."""
        return max(self.shares, key=lambda cause: self.shares[cause])

    @cached_property
    def links(self) -> dict[str, int]:
        """What goes over each kind of link in all [bytes]; sums count their payload once for each group that sums."""
        summed = [piece.summed_bytes for piece in self.pieces]
        return {
            "disk written": self.harvest.written_bytes,
            "disk read": self.placement.read_bytes,
            "host to device": sum(piece.host_bytes for piece in self.pieces),
            "latent sums": sum(latents for latents, _ in summed),
            "gradient sums": sum(gradients for _, gradients in summed),
        }

    @property
    def needed_disk_rate(self) -> float:
        """What the disk must give so that no device waits for it, on average over the training [bytes/s]."""
        return self.placement.read_bytes / self.placement.seconds


def cluster_plan(
    config: RunConfig, devices: int, gpu: str, *, utilisation: float | None = None, disk_gbps: float | None = None
) -> ClusterPlan:
    """Place the recipe's banks on `devices` devices of the kind `gpu`: a name, or a JSON file of rates.

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
    harvest = _harvest_plan(config, device, devices, disk_rate)
    return ClusterPlan(config.name, device, place(banks_of(config), device, devices, disk_rate), harvest, disk_rate)


def banks_of(config: RunConfig) -> list[Bank]:
    """The recipe's banks as numbers; an SAE that aims at no L0 is taken to end at the recipe's canonical one."""
    return [
        Bank(
            site=bank.site.folder,
            d_in=config.shape.d_in(bank.site),
            saes=tuple(PlannedCode(sae.width, sae.target_l0 or config.canonical_l0, len(sae.prefixes)) for sae in bank.saes),
            num_tokens=bank.num_tokens,
            batch_rows=bank.settings.batch_rows,
            row_bytes=config.shape.d_in(bank.site) * NUMBER_BYTES[config.harvest.dtype],
        )
        for bank in config.train_configs(Path())
    ]


def _harvest_plan(config: RunConfig, device: Device, devices: int, disk_rate: float | None) -> HarvestPlan:
    rows = max(config.tokens_of(site) for site in config.all_sites)  # one pass of the model writes every site
    numbers = rows * sum(config.shape.d_in(site) for site in config.all_sites)
    parameters, made_in = config.shape.num_parameters, NUMBER_BYTES[config.model.dtype]
    size = max(1, math.ceil(parameters * made_in / (device.memory_bytes * device.usable_memory)))
    rate = device.bfloat16_rate if config.model.dtype == "bfloat16" else device.float32_rate
    models = devices // size
    if not models:
        raise ConfigError(
            f"the model's {human_bytes(parameters * made_in)} do not fit {devices} {device.name}; plan for {size} or more --gpus"
        )
    flop = float(FLOP_PER_MODEL_PARAMETER) * parameters * rows
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
                "pieces": len(plan.pieces),
                "widest_piece_devices": max(piece.devices for piece in plan.pieces),
            }
        )
    return lines
