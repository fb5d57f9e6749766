"""A cluster's plan for people and for programs: `everyscope plan RECIPE --gpus N --gpu KIND [--curve] [--json]`. Torch-free.

All that was assumed stands beside what follows from it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count
from everyscope.run.config import RunConfig
from everyscope.run.cost.cluster import CURVE, ClusterPlan, Placed, cluster_plan, curve
from everyscope.run.cost.storage import duration
from everyscope.suite.layout import width_label
from everyscope.train.devices import Device
from everyscope.train.step_time import ASSUMED


def cluster_report(
    config: RunConfig,
    gpus: int,
    gpu: str,
    *,
    mfu: float | None = None,
    disk_gbps: float | None = None,
    with_curve: bool = False,
    dollars: float | None = None,
) -> tuple[dict[str, Any], list[Table]]:
    """The plan as JSON values and as tables; raises what `cluster_plan` does. The curve takes powers of two up to `gpus`.

    `dollars` is the price of one device [USD/h].
    """
    rates = {"utilisation": mfu, "disk_gbps": disk_gbps}
    plan = cluster_plan(config, gpus, gpu, **rates)
    found, tables = cluster_plan_json(plan), [_group_table(plan), _total_table(plan, dollars)]
    if dollars is not None:
        found["dollars"] = _cost(plan, dollars)
    if with_curve:
        lines = curve(config, gpu, sorted({*(count for count in CURVE if count < gpus), gpus}), **rates)
        found["curve"] = lines
        tables.append(curve_table(lines, plan.name, plan.device))
    tables[-1].caption, tables[-1].caption_justify = assumptions(plan.device), "left"
    return found, tables


def cluster_plan_json(plan: ClusterPlan) -> dict[str, Any]:
    """The plan as plain JSON values, every training group included."""
    return {
        "name": plan.name,
        "device": plan.device.as_json(),
        "devices": plan.devices,
        "assumed": ASSUMED,
        "hours": plan.seconds / 3600,
        "harvest": asdict(plan.harvest) | {"seconds": plan.harvest.seconds},
        "train_seconds": plan.train_seconds,
        "device_seconds": plan.busy,
        "bottleneck": plan.bottleneck,
        "shares": plan.shares,
        "read_bytes": plan.read_bytes,
        "disk_bytes_per_second": plan.disk_rate,
        "needed_disk_bytes_per_second": plan.needed_disk_rate,
        "groups": [
            {
                "site": placed.group.site.folder,
                "widths": [sae.width for sae in placed.group.saes],
                "shards": placed.group.settings.latent_shards,
                "replicas": placed.group.settings.replicas,
                "memory_bytes": placed.memory,
                "step_seconds": asdict(placed.step),
                "copy_seconds": placed.copy,
                "start": placed.start,
                "end": placed.start + placed.seconds,
            }
            for placed in plan.placed
        ],
    }


def curve_table(lines: Sequence[dict[str, Any]], name: str, device: Device) -> Table:
    """The curve for people."""
    table = Table(title=f"{name} on {device.name}, simulated", title_justify="left", box=box.SIMPLE)
    headings = ("devices", "time", "speed-up", "efficiency", "largest share", "idle", "disk GB/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "largest share" else "right", no_wrap=True)
    for line in lines:
        share = line["shares"][line["bottleneck"]]
        table.add_row(
            str(line["devices"]),
            duration(line["hours"] * 3600),
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


def _cost(plan: ClusterPlan, dollars: float) -> float:
    """Of all devices from the run's first second to its last, whether they are busy or not [USD]."""
    return plan.devices * plan.seconds / 3600 * dollars


def _group_table(plan: ClusterPlan) -> Table:
    title = f"{plan.name}: {len(plan.placed)} training groups on {plan.devices} x {plan.device.name}, simulated"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("site", "SAEs", "groups", "GPUs", "memory", "step, copy", "time"):
        table.add_column(heading, justify="left" if heading in ("site", "SAEs") else "right", no_wrap=heading != "SAEs")
    alike: dict[tuple[Any, ...], list[Placed]] = {}
    for placed in plan.placed:
        widths = tuple(sorted(sae.width for sae in placed.group.saes))
        alike.setdefault((placed.group.site.kind, placed.group.num_tokens, widths, placed.devices), []).append(placed)
    for (kind, _, widths, devices), members in sorted(alike.items(), key=lambda item: -item[1][0].seconds):
        placed = members[0]
        saes = " + ".join(f"{widths.count(width)} x {width_label(width)}" for width in sorted(set(widths)))
        times = (f"{placed.step.total * 1e3:,.3g}, {placed.copy * 1e3:,.2g} ms", duration(placed.seconds))
        table.add_row(kind, saes, str(len(members)), str(devices), human_bytes(placed.memory), *times)
    table.caption, table.caption_justify = "each group on so many GPUs of one host; memory of one of them; time of each", "left"
    return table


def _total_table(plan: ClusterPlan, dollars: float | None) -> Table:
    table = Table(title="Totals", title_justify="left", show_header=False, box=box.SIMPLE)
    spread = f", the model over {plan.harvest.devices_per_model} devices" if plan.harvest.devices_per_model > 1 else ""
    table.add_row("harvest", f"{duration(plan.harvest.seconds)}{spread}")
    table.add_row("training", duration(plan.train_seconds))
    if dollars is not None:
        table.add_row("cost", f"${_cost(plan, dollars):,.0f}: {plan.devices} devices at ${dollars:g} an hour each")
    table.add_row("device hours", f"{human_count(plan.busy / 3600)} of {human_count(plan.devices * plan.train_seconds / 3600)}")
    shares = sorted(plan.shares.items(), key=lambda item: -item[1])
    table.add_row("time goes to", ", ".join(f"{cause} {share:.0%}" for cause, share in shares if share >= 0.005))
    table.add_row("disk written, read", f"{human_bytes(plan.harvest.written_bytes)}, {human_bytes(plan.read_bytes)}")
    given = f"{plan.disk_rate / 1e9:,.3g} GB/s given, " if plan.disk_rate else ""
    table.add_row("disk rate", f"{given}{plan.needed_disk_rate / 1e9:,.3g} GB/s needed")
    return table
