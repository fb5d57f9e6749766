"""A cluster's plan for people and for programs: `everyscope plan RECIPE --gpus N --gpu KIND [--curve] [--json]`. Torch-free.

All that was assumed stands beside what follows from it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count
from everyscope.cost.cluster import CURVE, ClusterPlan, cluster_plan, curve
from everyscope.cost.devices import DEVICES, Device
from everyscope.cost.pieces import Piece
from everyscope.cost.step import ASSUMED
from everyscope.run.config import RunConfig
from everyscope.suite.layout import width_label


@dataclass(frozen=True)
class ClusterReport:
    """A plan and, if it was asked for, the curve of plans for fewer devices."""

    plan: ClusterPlan
    curve: tuple[dict[str, Any], ...]
    """Empty where it was not asked for."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, every placed piece included."""
        return plan_json(self.plan) | ({"curve": list(self.curve)} if self.curve else {})

    def tables(self) -> list[Table]:
        """Pieces by what they are alike in, totals, and the curve."""
        drawn = [_piece_table(self.plan), _total_table(self.plan)]
        if self.curve:
            return [*drawn, curve_table(self.curve, self.plan.name, self.plan.device)]
        drawn[-1].caption, drawn[-1].caption_justify = assumptions(self.plan.device), "left"
        return drawn


def wants_cluster(options: argparse.Namespace) -> bool:
    """Whether the flags of `everyscope plan` ask for a cluster; ConfigError for flags that do not go together."""
    of_cluster = {"--gpu": options.gpu, "--mfu": options.mfu, "--curve": options.curve or None}
    of_machine = {"--teraflops": options.teraflops, "--model-tokens-per-second": options.model_tokens_per_second}
    given = next((flag for flag, value in of_cluster.items() if value is not None), None)
    if options.gpus is None and given is not None:
        raise ConfigError(f"{given} is about a cluster: say how many devices it has with --gpus N")
    if options.gpus is not None and options.gpu is None:
        raise ConfigError(f"--gpus {options.gpus}: of what kind? add --gpu with {', '.join(DEVICES)} or a .json file of rates")
    given = next((flag for flag, value in of_machine.items() if value is not None), None)
    if options.gpus is not None and given is not None:
        raise ConfigError(f"{given} is about this machine, not about --gpus {options.gpus}; leave it out, or give --mfu")
    return options.gpus is not None


def cluster_report(
    config: RunConfig, gpus: int, gpu: str, *, mfu: float | None = None, disk_gbps: float | None = None, with_curve: bool = False
) -> ClusterReport:
    """What `everyscope plan` prints with --gpus; raises what `cluster_plan` does. The curve takes powers of two up to `gpus`."""
    rates = {"utilisation": mfu, "disk_gbps": disk_gbps}
    plan = cluster_plan(config, gpus, gpu, **rates)
    counts = sorted({*(count for count in CURVE if count < gpus), gpus})
    return ClusterReport(plan, tuple(curve(config, gpu, counts, **rates)) if with_curve else ())


def plan_json(plan: ClusterPlan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {
        "name": plan.name,
        "device": plan.device.as_json(),
        "devices": plan.devices,
        "assumed": ASSUMED,
        "hours": plan.seconds / 3600,
        "harvest": asdict(plan.harvest) | {"seconds": plan.harvest.seconds},
        "train_seconds": plan.train_seconds,
        "least_train_seconds": plan.placement.least_seconds,
        "device_seconds": plan.placement.busy,
        "bottleneck": plan.bottleneck,
        "shares": plan.shares,
        "link_bytes": plan.links,
        "shared_read_bytes": plan.shared_read_bytes,
        "disk_bytes_per_second": plan.disk_rate,
        "needed_disk_bytes_per_second": plan.needed_disk_rate,
        "pieces": [
            _piece_json(placed.piece) | {"start": placed.start, "end": placed.end, "devices": list(placed.devices)}
            for placed in plan.placement.placed
        ],
    }


def curve_table(lines: Sequence[dict[str, Any]], name: str, device: Device) -> Table:
    """The curve for people, with what it assumes below."""
    table = Table(title=f"{name} on {device.name}, simulated", title_justify="left", box=box.SIMPLE)
    headings = ("devices", "hours", "speed-up", "efficiency", "largest share", "idle", "disk GB/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "largest share" else "right", no_wrap=True)
    for line in lines:
        share = line["shares"][line["bottleneck"]]
        table.add_row(
            str(line["devices"]),
            _hours(line["hours"]),
            f"{line['speed_up']:,.1f}",
            f"{line['efficiency']:.0%}",
            f"{line['bottleneck']} {share:.0%}",
            f"{line['shares']['idle']:.0%}",
            f"{line['needed_disk_bytes_per_second'] / 1e9:,.1f}",
        )
    table.caption, table.caption_justify = assumptions(device), "left"
    return table


def assumptions(device: Device) -> str:
    """What times rest on, in words."""
    if device.utilisation is not None:
        step = f"{device.utilisation:.1%} model FLOP utilisation"
    else:
        step = f"{device.product_share:.0%} of the products' peak, {device.memory_share:.0%} of the memory's; " + ", ".join(
            f"{name.replace('_', ' ')} {value:g}" for name, value in ASSUMED.items()
        )
    links = f"{device.link_share:.0%} of the links' bandwidths, no latencies of links or kernels"
    return f"{device.name}: {device.origin}. Assumed: {links}; {step}."


def _hours(hours: float) -> str:
    """To three digits, or all of them where there are more."""
    return f"{hours:,.0f}" if hours >= 999.5 else f"{hours:.3g}"


def _piece_json(piece: Piece) -> dict[str, Any]:
    return {
        "site": piece.bank.site,
        "widths": [sae.width for sae in piece.saes],
        "shards": piece.shards,
        "replicas": piece.replicas,
        "memory_bytes": piece.memory,
        "step_seconds": asdict(piece.step),
        "copy_seconds": piece.copy,
    }


def _piece_table(plan: ClusterPlan) -> Table:
    title = f"{plan.name}: {len(plan.pieces)} pieces on {plan.devices} x {plan.device.name}, simulated"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("site", "SAEs", "pieces", "devices", "memory", "step, copy", "hours"):
        table.add_column(heading, justify="left" if heading in ("site", "SAEs") else "right", no_wrap=heading != "SAEs")
    alike: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in plan.pieces:
        widths = tuple(sorted(sae.width for sae in piece.saes))
        key = (piece.bank.site.partition("/")[0], piece.bank.num_tokens, widths, piece.shards, piece.replicas)
        alike.setdefault(key, []).append(piece)
    for (kind, _, widths, shards, replicas), pieces in sorted(alike.items(), key=lambda item: -item[1][0].seconds):
        piece = pieces[0]
        saes = " + ".join(f"{widths.count(width)} x {width_label(width)}" for width in sorted(set(widths)))
        cells = (str(len(pieces)), f"{shards} x {replicas}", human_bytes(piece.memory))
        times = (f"{piece.step.total * 1e3:,.3g}, {piece.copy * 1e3:,.2g} ms", _hours(piece.seconds / 3600))
        table.add_row(kind, saes, *cells, *times)
    table.caption, table.caption_justify = "each piece on shards x replicas devices; memory of one of them; hours each", "left"
    return table


def _total_table(plan: ClusterPlan) -> Table:
    table = Table(title="Totals", title_justify="left", show_header=False, box=box.SIMPLE)
    harvest, placement = plan.harvest, plan.placement
    spread = f", the model over {harvest.devices_per_model} devices" if harvest.devices_per_model > 1 else ""
    table.add_row("harvest", f"{_hours(harvest.seconds / 3600)} h{spread}")
    lost = plan.train_seconds / placement.least_seconds
    table.add_row("training", f"{_hours(plan.train_seconds / 3600)} h, {lost:.2f} of the least that these pieces allow")
    table.add_row(
        "device hours", f"{human_count(placement.busy / 3600)} of {human_count(plan.devices * plan.train_seconds / 3600)}"
    )
    shares = sorted(plan.shares.items(), key=lambda item: -item[1])
    table.add_row("time goes to", ", ".join(f"{cause} {share:.0%}" for cause, share in shares if share >= 0.005))
    table.add_row("bottleneck", plan.bottleneck)
    for link, size in plan.links.items():
        table.add_row(link, human_bytes(size) if size else "none")
    table.add_row("disk read, pieces of a bank together", human_bytes(plan.shared_read_bytes))
    given = f"{plan.disk_rate / 1e9:,.3g} GB/s given, " if plan.disk_rate else ""
    table.add_row("disk rate", f"{given}{plan.needed_disk_rate / 1e9:,.3g} GB/s needed")
    return table
