"""Writing one shard: rows arrive in reading order and are scattered to their shuffled places in a mapped file.

The file stands under its own name, and its sidecar beside it, only after the `with` block has ended well; an error inside
leaves neither. A kill leaves at most `*.partial`, or a shard without sidecar, which the next run writes anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from everyscope.base.errors import ShapeMismatch
from everyscope.base.files import PARTIAL, whole_file, write_json
from everyscope.shards.bits import TORCH_DTYPE, carrier_of
from everyscope.shards.checksums import checksums_of
from everyscope.shards.format import Layout, RowDtype, activation_layout, create_shard, token_layout
from everyscope.shards.manifest import ShardRecord, sidecar_path
from everyscope.shards.statistics import Sums


class ActivationWriter:
    """An open shard of one site. `put` every row once."""

    def __init__(self, name: str, views: dict[str, np.ndarray], dtype: RowDtype, sums: Sums) -> None:
        """Made by `new_activation_shard`; `name` stands in errors, `views` are windows on the mapped file."""
        self._name, self._views, self._sums = name, views, sums
        self._dtype = TORCH_DTYPE[dtype]
        self.num_put = 0

    def put(
        self,
        rows: Float[Tensor, "rows d_in"],
        places: Int[np.ndarray, " rows"],
        sequence: Int[np.ndarray, " rows"],
        position: Int[np.ndarray, " rows"],
    ) -> None:
        """Store `rows` at `places`, with the block and the position that each is from; NonFinite and ShapeMismatch name them."""
        d_in = self._views["activations"].shape[1]
        if tuple(rows.shape) != (len(places), d_in):
            raise ShapeMismatch(
                f"{self._name}: rows of shape {tuple(rows.shape)}, expected ({len(places)}, {d_in}); harvest again"
            )
        stored = rows.detach().to("cpu", self._dtype).contiguous()

        def name(row: int) -> str:
            return f"{self._name}, block {sequence[row]}, position {position[row]}"

        self._sums.add(stored.float().numpy(), position, name)
        self._views["activations"][places] = carrier_of(stored)
        self._views["sequence"][places] = sequence
        self._views["position"][places] = position
        self.num_put += len(places)


@contextmanager
def new_activation_shard(
    path: Path, name: str, rows: int, d_in: int, dtype: RowDtype, context: int, after: dict[str, int]
) -> Iterator[ActivationWriter]:
    """A shard of exactly `rows` rows at `path`, committed when the block ends; `after` goes into its sidecar."""
    layout, sums = activation_layout(rows, d_in, dtype), Sums(d_in, context)
    sidecar_path(path).unlink(missing_ok=True)  # of a shard that was deleted: it must not commit the new one early
    with whole_file(path) as partial:
        raw = create_shard(partial, layout)
        writer = ActivationWriter(name, layout.views(raw), dtype, sums)
        yield writer
        assert writer.num_put == rows, f"{path}: {writer.num_put} rows put, {rows} expected"
        record = _record(partial, raw, layout, after, sums)
    write_json(sidecar_path(path), record.as_json())


def write_token_shard(path: Path, input_ids: Int[np.ndarray, "blocks ctx"], after: dict[str, int]) -> None:
    """Store blocks of token ids, whole or not at all, and commit them with a sidecar that holds `after`."""
    layout = token_layout(*input_ids.shape)
    sidecar_path(path).unlink(missing_ok=True)
    with whole_file(path) as partial:
        raw = create_shard(partial, layout)
        layout.views(raw)["input_ids"][:] = input_ids
        record = _record(partial, raw, layout, after, None)
    write_json(sidecar_path(path), record.as_json())


def _record(partial: Path, raw: np.ndarray, layout: Layout, after: dict[str, int], sums: Sums | None) -> ShardRecord:
    assert isinstance(raw, np.memmap)
    raw.flush()
    checksums, rows = checksums_of(partial), layout.tensors[-1]
    return ShardRecord(
        file=partial.name.removesuffix(PARTIAL),
        num_bytes=layout.num_bytes,
        rows=rows.shape[0],
        d_in=rows.shape[1],
        dtype=rows.dtype,
        sha256=checksums.sha256,
        xxh3=checksums.xxh3,
        after=after,
        statistics=sums.record() if sums else None,
    )
