"""Writing one shard: rows arrive in reading order and go to their shuffled places.

The file stands under its own name, and its sidecar beside it, only after the `with` block has ended well; an error inside
leaves neither. A kill leaves at most `*.partial`, or a shard without sidecar, which the next run rewrites.

A shard that fits in memory is put together there, each row straight at its place, and written at the end: to write through a
map costs a page fault for every 4 KiB. One that does not fit is mapped, and cut into segments, whose rows are appended in the
order in which they come, so that the disk sees a few streams; when all have come, each segment in turn is put in order in
memory and written back. The bytes are the same either way. Memory: the shard; or a segment, a copy of it, and 24 bytes a row,
besides the map, which the system may write back whenever it likes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from everyscope.activations.shards.bits import TORCH_DTYPE, carrier_of, reading_tensor
from everyscope.activations.shards.checksums import BLOCK_BYTES, Checksums, Hasher
from everyscope.activations.shards.format import (
    Layout,
    RowDtype,
    TensorDtype,
    activation_layout,
    create_shard,
    reserve_shard,
    token_layout,
)
from everyscope.activations.shards.kernels import place_bfloat16, place_float32, round_and_place
from everyscope.activations.shards.manifest import ShardRecord, sidecar_path
from everyscope.activations.shards.memory import RecycledMemory
from everyscope.activations.shards.statistics import Sums, SumsRecord
from everyscope.base.errors import ShapeMismatch
from everyscope.base.files import sync, whole_file, write_json


class ActivationWriter:
    """An open shard of one site. `put` every row once; `finish`, or leave it to the end of the block."""

    def __init__(
        self, name: str, path: Path, layout: Layout, sums: Sums, segment_rows: int | None, memory: RecycledMemory
    ) -> None:
        """Made by `new_activation_shard`; `name` stands in errors, `path` is that of the unfinished file."""
        self._name, self._path, self._layout, self._sums = name, path, layout, sums
        self._raw = create_shard(path, layout) if segment_rows else in_memory(path, layout, memory)
        self._views = layout.views(self._raw)
        self._rows, self._d_in = self._views["activations"].shape
        self._row_dtype: TensorDtype = layout.tensors[-1].dtype
        self._dtype = TORCH_DTYPE[self._row_dtype]
        self._segments = _Segments(self._rows, min(segment_rows, self._rows)) if segment_rows else None
        self._checksums: Checksums | None = None
        self.num_put = 0
        self.seconds = {"copy": 0.0, "write": 0.0}
        """Time spent on the way from the device to memory, and from there into the file [s]."""

    def put(
        self,
        rows: Float[Tensor, "m d_in"],
        places: Int[np.ndarray, " rows"],
        sequence: Int[np.ndarray, " rows"],
        position: Int[np.ndarray, " rows"],
        taken: Int[np.ndarray, " rows"] | None = None,
    ) -> None:
        """Store rows at `places`, with the block and the position that each is from; NonFinite and ShapeMismatch name them.

        `taken` says which of `rows` are meant, in order; all are where it is left out. It saves the caller from copying them.
        """
        count = len(rows) if taken is None else len(taken)
        if rows.ndim != 2 or rows.shape[1] != self._d_in or count != len(places):
            raise ShapeMismatch(
                f"{self._name}: rows of shape ({', '.join(map(str, (count, *rows.shape[1:])))}), "
                f"expected ({len(places)}, {self._d_in}); harvest again"
            )
        if not count:
            return
        start = time.perf_counter()
        rows, taken = self._on_host(rows.detach(), taken)
        copied = time.perf_counter()
        assert min(places.min(), taken.min()) >= 0, f"{self._name}: places from {places.min()}, rows from {taken.min()}"
        assert places.max() < self._rows, f"{self._name}: place {places.max()} of {self._rows}"
        assert taken.max() < len(rows), f"{self._name}: row {taken.max()} of {len(rows)}"
        targets = places if self._segments is None else self._segments.arrive(places)
        total, norms = np.zeros(self._d_in, np.float64), np.empty(count, np.float64)
        self._place(rows, taken.astype(np.int64, copy=False), targets.astype(np.int64, copy=False), total, norms)

        def stored(some: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d_in"]:
            chosen = np.ascontiguousarray(self._views["activations"][targets[some]])
            if self._row_dtype == "float32":
                return chosen
            return reading_tensor(chosen.view(np.uint8).reshape(-1), self._row_dtype, chosen.shape).float().numpy()

        def name(row: int) -> str:
            return f"{self._name}, block {sequence[row]}, position {position[row]}"

        self._sums.count(total, norms, position, sequence, stored, name)
        self._views["sequence"][targets] = sequence
        self._views["position"][targets] = position
        self.num_put += count
        self.seconds["copy"] += copied - start
        self.seconds["write"] += time.perf_counter() - copied

    @property
    def is_in_memory(self) -> bool:
        """Whether the shard is put together in memory."""
        return self._segments is None

    def finish(self) -> Checksums:
        """Put the last things in order, sum up the bytes and write them: all the work of the CPU. Idempotent."""
        if self._checksums is None:
            assert self.num_put == self._rows, f"{self._name}: {self.num_put} rows put, {self._rows} expected"
            if self._segments is None:
                self._checksums = write_out(self._path, self._raw)
                self._raw, self._views = np.empty(0, np.uint8), {}
            else:
                self._checksums = self._sort(self._segments)
        return self._checksums

    def sync(self) -> None:
        """`finish`, and wait for the disk. What closes the shard does so too; this is for several shards at once."""
        self.finish()
        if isinstance(self._raw, np.memmap):
            self._raw.flush()
        sync(self._path)

    def _sort(self, segments: "_Segments") -> Checksums:
        """Put the segments in order, and hash the file while it passes through memory."""
        assert isinstance(self._raw, np.memmap)
        hasher, data = Hasher(), self._raw.data
        segments.close()
        for name in ("sequence", "position"):
            for index in range(segments.count):
                segments.sort(index, self._views[name])
        hasher.update(data[: self._layout.byte_range("activations", 0, self._rows)[0]])
        for index in range(segments.count):
            start, stop = segments.sort(index, self._views["activations"])
            hasher.update(data[slice(*self._layout.byte_range("activations", start, stop))])
        return hasher.checksums()

    def _on_host(self, rows: Tensor, taken: np.ndarray | None) -> tuple[Tensor, np.ndarray]:
        """Rows that a kernel can read, and which of them are meant. A device gives away only those, in the stored format."""
        if rows.device.type != "cpu":
            chosen = rows if taken is None else rows.index_select(0, torch.from_numpy(taken).to(rows.device))
            return on_host(chosen.to(self._dtype).contiguous()), np.arange(len(chosen))
        if rows.dtype not in (torch.float32, torch.bfloat16) or (rows.dtype, self._dtype) == (torch.bfloat16, torch.float32):
            rows = rows.float()
        return rows.contiguous(), np.arange(len(rows)) if taken is None else taken

    def _place(self, rows: Tensor, taken: np.ndarray, targets: np.ndarray, total: np.ndarray, norms: np.ndarray) -> None:
        out = self._views["activations"]
        if self._dtype == torch.float32:
            place_float32(rows.numpy(), taken, targets, out, total, norms)
        elif rows.dtype == torch.bfloat16:
            place_bfloat16(carrier_of(rows), taken, targets, out, total, norms)
        else:
            round_and_place(rows.numpy().view(np.uint32), taken, targets, out, total, norms)


def on_host(rows: Tensor) -> Tensor:
    """A copy in this host's memory; of a GPU's rows by way of page-locked memory, waiting for the current stream alone."""
    if rows.device.type != "cuda":
        return rows.cpu()
    copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    copy.copy_(rows, non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return copy


class _Segments:
    """Which row stands where in a shard whose rows still wait, segment by segment, in the order in which they came."""

    def __init__(self, rows: int, segment_rows: int) -> None:
        self._rows, self._segment_rows = rows, segment_rows
        self.count = -(-rows // segment_rows)
        self._filled = np.zeros(self.count, np.int64)
        self._arrived: list[Int32[np.ndarray, " rows"]] = []
        self._places = np.empty(0, np.int32)

    def arrive(self, places: Int[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Where rows that belong at `places` are to wait: behind those of their segment that came before."""
        segment = places // self._segment_rows
        order = np.argsort(segment, kind="stable")
        counts = np.bincount(segment, minlength=self.count)
        rank = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        targets = np.empty(len(places), np.int64)
        targets[order] = segment[order] * self._segment_rows + self._filled[segment[order]] + rank
        self._filled += counts
        self._arrived.append(places.astype(np.int32, copy=False))  # shared with the other sites of the same rows
        return targets

    def close(self) -> None:
        """No more rows will come."""
        places = np.concatenate(self._arrived)
        self._places = places[np.argsort(places // self._segment_rows, kind="stable")]
        self._arrived = []

    def sort(self, index: int, rows: np.ndarray) -> tuple[int, int]:
        """Put segment `index` of `rows` in order; where it lies, [start, stop) in rows."""
        start = index * self._segment_rows
        stop = min(start + self._segment_rows, self._rows)
        waiting = np.array(rows[start:stop])
        rows[self._places[start:stop]] = waiting
        return start, stop


@contextmanager
def new_activation_shard(
    path: Path,
    name: str,
    rows: int,
    d_in: int,
    dtype: RowDtype,
    context: int,
    after: dict[str, int],
    segment_rows: int | None = None,
    memory: RecycledMemory | None = None,
) -> Iterator[ActivationWriter]:
    """A shard of exactly `rows` rows at `path`, committed when the block ends; `after` goes into its sidecar.

    `segment_rows` is for shards that do not fit in memory, alone or together (see the module); None keeps the
    shard in memory, in that of `memory` where one shard follows another.
    """
    layout, sums = activation_layout(rows, d_in, dtype), Sums(d_in, context)
    sidecar_path(path).unlink(missing_ok=True)  # of a shard that was deleted: it must not commit the new one early
    with whole_file(path) as partial:
        writer = ActivationWriter(name, partial, layout, sums, segment_rows, memory or RecycledMemory())
        yield writer
        writer.sync()
    checksums = writer.finish()
    write_json(sidecar_path(path), _record(path, layout, checksums, after, sums.record()).as_json())


def write_token_shard(path: Path, input_ids: Int[np.ndarray, "blocks ctx"], after: dict[str, int]) -> None:
    """Store blocks of token ids, whole or not at all, and commit them with a sidecar that holds `after`."""
    layout = token_layout(*input_ids.shape)
    sidecar_path(path).unlink(missing_ok=True)
    with whole_file(path) as partial:
        raw = in_memory(partial, layout, RecycledMemory())
        layout.views(raw)["input_ids"][:] = input_ids
        checksums = write_out(partial, raw)
    write_json(sidecar_path(path), _record(path, layout, checksums, after, None).as_json())


def in_memory(path: Path, layout: Layout, memory: RecycledMemory) -> np.ndarray:
    """Memory for a whole shard, header included, as uint8 [bytes]; the disk at `path` has kept room for it."""
    reserve_shard(path, layout)
    raw = memory.take(layout.num_bytes)
    raw[: len(layout.header)] = np.frombuffer(layout.header, np.uint8)
    return raw


def write_out(path: Path, raw: np.ndarray) -> Checksums:
    """Write a shard from memory, and hash it on the way, a block at a time."""
    hasher = Hasher()
    with path.open("r+b", buffering=0) as file:
        for start in range(0, len(raw), BLOCK_BYTES):
            block = raw[start : start + BLOCK_BYTES].data
            hasher.update(block)
            while len(block):
                block = block[file.write(block) :]
    return hasher.checksums()


def _record(
    path: Path, layout: Layout, checksums: Checksums, after: dict[str, int], statistics: SumsRecord | None
) -> ShardRecord:
    rows = layout.tensors[-1]
    return ShardRecord(
        file=path.name,
        num_bytes=layout.num_bytes,
        rows=rows.shape[0],
        d_in=rows.shape[1],
        dtype=rows.dtype,
        sha256=checksums.sha256,
        xxh3=checksums.xxh3,
        after=after,
        statistics=statistics,
    )
