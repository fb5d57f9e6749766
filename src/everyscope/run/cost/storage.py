"""Disk or live: whether activations are better kept or made while SAEs train, for a recipe and a machine. Torch-free.

    disk    max(harvest, write) + max(train, read)     first the model runs, writing beside it; then SAEs train, reading beside it
    live    harvest x passes + train                   model and SAEs take turns on one machine; what is read again is made again

Each way is a sum of times by rates that are measured or given. Keeping activations wins wherever the disk keeps up, for the next
sweep then begins with training. Gemma Scope (arXiv 2408.05147, section 3.3) found keeping them for 10 to 100 days at least ten
times cheaper than making them once more; and making them better where disk is capped, where it is slow, or where every
setting is known before.
"""

import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from everyscope.base.errors import ConfigError
from everyscope.base.files import human_bytes
from everyscope.base.progress import human_count

PROBE_BYTES, PROBE_PIECE = 32 << 20, 4 << 20
"""Written and read to measure a disk, and how much of it at once [bytes]."""
WORTH = 0.95
"""Live is advised for its speed where it takes less than this share of the disk's time: what is kept has a worth too [1]."""


@dataclass(frozen=True)
class SiteDemand:
    """What one site's activations are needed for."""

    row_bytes: int
    """One activation vector in the recipe's number format [bytes]."""
    rows: int
    """Rows of one pass, which a disk would keep [rows]."""
    trained: tuple[int, ...]
    """Rows that each training group of the site sees [rows]."""

    def bytes_read(self, sharing: int) -> int:
        """Bytes that come off a disk when up to `sharing` training groups share each read: the longest of them pays [bytes]."""
        assert sharing > 0, f"sharing={sharing}"
        return self.row_bytes * sum(sorted(self.trained, reverse=True)[::sharing])


@dataclass(frozen=True)
class Rate:
    """So much a second."""

    per_second: float
    origin: str
    """Where the number is from, for people."""


@dataclass(frozen=True)
class StoragePlan:
    """What both ways take, and which is advised."""

    disk_bytes: int
    """Shards of all sites, written once [bytes]."""
    free_bytes: int
    """Free in the run's folder [bytes]."""
    bytes_read: int
    """Read while SAEs train, every training group by itself [bytes]."""
    bytes_read_shared: int
    """The same where all training groups of a site share each read, as from a server [bytes]."""
    passes: float
    """How often the model runs over the rows in live mode: what the longest training sees, by what a pass holds [1]."""
    harvest_seconds: float
    """One pass of the model [s]."""
    train_seconds: float
    """Training by itself, never waiting for rows [s]."""
    disk: Rate
    """Bytes written or read in a second."""
    model: Rate
    """Tokens through the model in a second."""

    @property
    def write_seconds(self) -> float:
        """Writing the shards [s]."""
        return self.disk_bytes / self.disk.per_second

    @property
    def read_seconds(self) -> float:
        """Reading for all training groups, each by itself [s]."""
        return self.bytes_read / self.disk.per_second

    @property
    def disk_seconds(self) -> float:
        """Harvest, then training from the disk [s]."""
        return max(self.harvest_seconds, self.write_seconds) + self.disk_again_seconds

    @property
    def disk_again_seconds(self) -> float:
        """One more training of the same size, from the activations that are kept [s]."""
        return max(self.train_seconds, self.read_seconds)

    @property
    def live_seconds(self) -> float:
        """Model and training in turns; one more training of the same size takes as long again [s]."""
        return self.harvest_seconds * self.passes + self.train_seconds

    @property
    def sweeps_to_repay(self) -> int | None:
        """From how many trainings on the disk takes less time; None where it never does."""
        saved = self.live_seconds - self.disk_again_seconds
        if saved <= 0:
            return None
        return math.floor(max(self.harvest_seconds, self.write_seconds) / saved) + 1

    @property
    def advice(self) -> Literal["disk", "live"]:
        """Live where the shards do not fit, or where the disk is so slow that computing rows again is quicker; else disk."""
        is_slow = self.live_seconds < WORTH * self.disk_seconds
        return "live" if self.disk_bytes > self.free_bytes or is_slow else "disk"

    @property
    def reason(self) -> str:
        """Why, in one sentence."""
        again = f"every further training takes {duration(self.disk_again_seconds)} from disk, {duration(self.live_seconds)} live"
        if self.disk_bytes > self.free_bytes:
            return f"the shards need {human_bytes(self.disk_bytes)}, and {human_bytes(self.free_bytes)} are free"
        if self.advice == "disk":
            return f"the disk keeps up, and stored shards serve every later sweep: {again}"
        never = "and never pays" if self.sweeps_to_repay is None else f"and pays from {self.sweeps_to_repay} trainings on"
        return f"this disk is slower than the model: it costs {duration(self.disk_seconds - self.live_seconds)} more, {never}"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "advice": self.advice,
            "reason": self.reason,
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "bytes_read": self.bytes_read,
            "bytes_read_shared": self.bytes_read_shared,
            "passes": self.passes,
            "disk_seconds": self.disk_seconds,
            "disk_again_seconds": self.disk_again_seconds,
            "live_seconds": self.live_seconds,
            "disk_bytes_per_second": self.disk.per_second,
            "disk_rate_origin": self.disk.origin,
            "model_tokens_per_second": self.model.per_second,
            "model_rate_origin": self.model.origin,
        }

    def table(self) -> Table:
        """The two ways side by side, and the advice."""
        table = Table("", "disk", "live", title="Disk or live", title_justify="left", box=box.SIMPLE)
        table.caption, table.caption_justify = f"{self.advice}: {self.reason}", "left"
        table.add_row("on disk", human_bytes(self.disk_bytes), "none")
        table.add_row("written", human_bytes(self.disk_bytes), "none")
        table.add_row("read, each training group by itself", human_bytes(self.bytes_read), "none")
        table.add_row("read, training groups of a site together", human_bytes(self.bytes_read_shared), "none")
        table.add_row("passes of the model", "1", f"{self.passes:.3g}")
        table.add_row("time", duration(self.disk_seconds), duration(self.live_seconds))
        table.add_row("time of one more training", duration(self.disk_again_seconds), duration(self.live_seconds))
        table.add_row("rate of the disk", f"{self.disk.per_second / 1e9:.3g} GB/s ({self.disk.origin})", "")
        table.add_row("rate of the model", f"{human_count(self.model.per_second)} tokens/s ({self.model.origin})", "")
        return table


def storage_plan(
    sites: Sequence[SiteDemand], train_seconds: float, model: Rate, folder: Path, disk_gbps: float | None = None
) -> StoragePlan:
    """Both ways priced, for a run in `folder`. `disk_gbps` None measures the disk there [10^9 bytes/s].

    ConfigError where the disk cannot be measured, or for rates that are not positive.
    """
    for what, rate in (("--model-tokens-per-second", model.per_second), ("--disk-gbps", disk_gbps)):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"{what} {rate:g}: expected a rate above 0")
    standing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    disk = Rate(measure_disk(standing), "measured there, just now") if disk_gbps is None else Rate(disk_gbps * 1e9, "given")
    rows = max(site.rows for site in sites)
    return StoragePlan(
        disk_bytes=sum(site.row_bytes * site.rows for site in sites),
        free_bytes=shutil.disk_usage(standing).free,
        bytes_read=sum(site.bytes_read(1) for site in sites),
        bytes_read_shared=sum(site.bytes_read(len(site.trained)) for site in sites),
        passes=max(1.0, max(tokens for site in sites for tokens in site.trained) / rows),
        harvest_seconds=rows / model.per_second,
        train_seconds=train_seconds,
        disk=disk,
        model=model,
    )


@functools.cache
def measure_disk(folder: Path, num_bytes: int = PROBE_BYTES) -> float:
    """Bytes a second of the disk under `folder`: the slower of writing, until it holds them, and of reading them back.

    Where the system keeps no promise to forget what it has cached, reading is too quick to be the slower. Once a process.
    """
    piece = os.urandom(PROBE_PIECE)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk_probe_") as file:
            start = time.perf_counter()
            for _ in range(num_bytes // PROBE_PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begun = time.perf_counter()
            while file.read(PROBE_PIECE):
                pass
            return num_bytes / max(written - start, time.perf_counter() - begun)
    except OSError as error:
        raise ConfigError(f"{folder}: the disk's speed cannot be measured ({error.strerror}); give --disk-gbps") from error


def duration(seconds: float) -> str:
    """A time for people, to three digits."""
    for unit, size in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if seconds < size:
            return f"{seconds:.3g} {unit}"
        seconds /= 24.0 if unit == "h" else 60.0
    return f"{seconds:,.3g} days" if seconds < 999.5 else f"{seconds:,.0f} days"
