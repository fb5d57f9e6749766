"""What a server counts: bytes read and served, hits and waiting, by site and by trainer; as JSON and as Prometheus reads it."""

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

REMEMBERED_TRAINERS = 256
"""Trainers whose counts are kept; beyond that those are forgotten that were served longest ago."""


@dataclass
class SiteCounts:
    """Counts of one site since the server started."""

    chunks_read: int = 0
    """Chunks taken from the origin [chunks]."""
    bytes_read: int = 0
    """Their size [bytes]."""
    chunks_served: int = 0
    """Chunks handed over to be sent [chunks]."""
    bytes_served: int = 0
    """Their size [bytes]."""
    bytes_fresh: int = 0
    """In the buffer and not served yet [bytes]."""
    bytes_wasted: int = 0
    """Read and replaced without ever being served, since those who asked had gone [bytes]."""
    hits: int = 0
    """Requests whose chunk was in the buffer when they came."""
    misses: int = 0
    """Requests that waited for a chunk to be read."""

    @property
    def amortisation(self) -> float:
        """Bytes served for each byte read, chunks that wait for their first reader left out; 1 before anything was read [1]."""
        done = self.bytes_read - self.bytes_fresh
        return self.bytes_served / done if done else 1.0

    @property
    def hit_rate(self) -> float:
        """Share of requests that found their chunk in the buffer; 0 before the first [1]."""
        return self.hits / max(self.hits + self.misses, 1)


@dataclass
class TrainerCounts:
    """Counts of one trainer at one site since the server started."""

    chunks: int = 0
    """Chunks handed over to be sent [chunks]."""
    bytes: int = 0
    """Their size [bytes]."""
    hits: int = 0
    """Requests whose chunk was in the buffer when they came."""
    waiting_seconds: float = 0.0
    """Time that requests have waited for the server, summed over them [s]."""


@dataclass
class ServerCounters:
    """All counts of one server."""

    sites: dict[str, SiteCounts]
    trainers: OrderedDict[tuple[str, str], TrainerCounts] = field(default_factory=OrderedDict)
    refusals: dict[str, int] = field(default_factory=dict)
    """Requests that were turned down, by reason."""

    def read(self, site: str, num_bytes: int) -> None:
        """A chunk came from the origin."""
        counts = self.sites[site]
        counts.chunks_read += 1
        counts.bytes_read += num_bytes
        counts.bytes_fresh += num_bytes

    def served(self, trainer: str, site: str, num_bytes: int, is_first: bool, is_hit: bool, waited: float) -> None:
        """A chunk was handed over; `is_first` says that it never was before, since it was read."""
        counts = self.sites[site]
        counts.chunks_served += 1
        counts.bytes_served += num_bytes
        counts.bytes_fresh -= num_bytes if is_first else 0
        counts.hits += is_hit
        counts.misses += not is_hit
        own = self.trainers.setdefault((trainer, site), TrainerCounts())
        self.trainers.move_to_end((trainer, site))
        own.chunks += 1
        own.bytes += num_bytes
        own.hits += is_hit
        own.waiting_seconds += waited
        if len(self.trainers) > REMEMBERED_TRAINERS:
            self.trainers.popitem(last=False)

    def wasted(self, site: str, num_bytes: int) -> None:
        """A chunk left the buffer that nobody was served."""
        self.sites[site].bytes_fresh -= num_bytes
        self.sites[site].bytes_wasted += num_bytes

    def refused(self, reason: str) -> None:
        """A request was turned down."""
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def as_json(self) -> dict[str, Any]:
        """All counts as plain JSON values."""
        return {
            "sites": {
                name: asdict(counts) | {"amortisation": counts.amortisation, "hit_rate": counts.hit_rate}
                for name, counts in self.sites.items()
            },
            "trainers": [{"trainer": name, "site": site} | asdict(counts) for (name, site), counts in self.trainers.items()],
            "refusals": dict(self.refusals),
        }


def prometheus(report: dict[str, Any]) -> str:
    """A server's report in the text format that Prometheus reads; names end in their unit."""
    lines: list[str] = []

    def family(name: str, kind: str, samples: list[tuple[dict[str, str], float]]) -> None:
        lines.append(f"# TYPE everyscope_{name} {kind}")
        for labels, value in samples:
            inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            lines.append(f"everyscope_{name}{{{inside}}} {value:g}" if inside else f"everyscope_{name} {value:g}")

    for name, kind in (
        ("bytes_read", "counter"),
        ("bytes_served", "counter"),
        ("bytes_wasted", "counter"),
        ("hits", "counter"),
        ("misses", "counter"),
        ("amortisation", "gauge"),
        ("hit_rate", "gauge"),
    ):
        samples = [({"site": site}, float(counts[name])) for site, counts in report["sites"].items()]
        family(f"{name}_total" if kind == "counter" else name, kind, samples)
    for name in ("bytes", "chunks", "waiting_seconds"):
        labelled = [({"trainer": row["trainer"], "site": row["site"]}, float(row[name])) for row in report["trainers"]]
        family(f"trainer_{name}_total", "counter", labelled)
    family("refusals_total", "counter", [({"reason": reason}, float(n)) for reason, n in report["refusals"].items()])
    for name, value in report["buffer"].items():
        family(f"buffer_{name}", "gauge", [({}, float(value))])
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
