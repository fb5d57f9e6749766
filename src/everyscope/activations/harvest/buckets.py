"""The text of a harvest, cut into buckets: the rows that are shuffled together and make one shard at every site.

A bucket is known in full before the model runs, so the place of each of its rows in the shard is known too, and rows can
be written to their places as they come. Nothing larger than two batches of activations is ever in memory. Where buckets end
follows from the config, the text, and `stops`: the rows at which earlier harvests, since extended, had ended.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.shards.checksums import BLOCK_BYTES
from everyscope.activations.shards.format import activation_layout, token_layout
from everyscope.activations.shards.norms import record_bytes
from everyscope.activations.shards.order import permutation
from everyscope.text.blocks import Block, Cursor, read_blocks

NUMBER_BYTES = 36
"""One number in a record, indented, on a line of its own: never more than this [bytes]."""
RECORD_BYTES = 2048
"""All other lines of a sidecar, and its entry in a manifest: never more than this [bytes]."""


@dataclass(frozen=True)
class HarvestPosition:
    """How far a harvest has come, at the border of two buckets."""

    bucket: int = 0
    """Buckets done [buckets]."""
    blocks: int = 0
    """Blocks read [blocks]."""
    rows: int = 0
    """Rows kept per site [rows]."""
    cursor: Cursor = field(default_factory=Cursor)
    """The place in the text."""

    def as_json(self) -> dict[str, int]:
        """The place as a sidecar keeps it."""
        return {"bucket": self.bucket, "blocks": self.blocks, "rows": self.rows, **asdict(self.cursor)}

    @classmethod
    def of_json(cls, value: dict[str, int]) -> "HarvestPosition":
        """The place that a sidecar keeps."""
        return cls(value["bucket"], value["blocks"], value["rows"], Cursor(value["documents"], value["tokens"]))


@dataclass(frozen=True)
class Bucket:
    """Whole blocks of text with at least `bucket_rows` positions that count, unless the harvest ends first."""

    before: HarvestPosition
    after: HarvestPosition
    input_ids: Int[np.ndarray, "blocks ctx"]
    """Token ids, int32."""
    mask: Bool[np.ndarray, "blocks ctx"]
    """True where a position becomes a row; cut short where the harvest has enough."""

    @property
    def num_rows(self) -> int:
        """Rows that the bucket gives to each site [rows]."""
        return self.after.rows - self.before.rows

    def places(self, seed: int) -> Int[np.ndarray, " rows"]:
        """For each row in reading order its place in the shard; the same for all sites."""
        return permutation(self.num_rows, seed, self.before.bucket).astype(np.int32)


def read_buckets(
    config: HarvestConfig,
    tokenizer: Any,
    start: HarvestPosition,
    stops: tuple[int, ...] = (),
    has_room: Callable[[HarvestPosition], bool] = lambda after: True,
) -> Iterator[Bucket]:
    """The buckets from `start` on, until there are `num_tokens` rows, the text ends, or there is no room for one block more.

    TextError where there is no text.
    """
    fresh = start == HarvestPosition()
    blocks = read_blocks(config.text, tokenizer, "train", None if fresh else start.cursor)
    place, gathered, rows = start, [], 0
    for block in blocks if place.rows < config.num_tokens else ():
        counted = int(block.mask.sum())
        if not has_room(HarvestPosition(place.bucket + 1, place.blocks + len(gathered) + 1, place.rows + rows + counted)):
            while gathered and not gathered[-1].mask.any():  # what fills no row must not show where the room ended
                gathered.pop()
            break
        gathered.append(block)
        rows += counted
        wanted = goal(place, config.num_tokens, stops) - place.rows
        if rows >= min(config.bucket_rows, wanted):
            bucket = _bucket(place, gathered, wanted)
            yield bucket
            place, gathered, rows = bucket.after, [], 0
            if place.rows >= config.num_tokens:
                return
    if rows:
        yield _bucket(place, gathered, goal(place, config.num_tokens, stops) - place.rows)


def goal(place: HarvestPosition, num_tokens: int, stops: tuple[int, ...]) -> int:
    """The rows that the bucket behind `place` may not go beyond [rows]."""
    return min((stop for stop in stops if stop > place.rows), default=num_tokens)


def is_full(before: HarvestPosition, after: HarvestPosition, config: HarvestConfig, stops: tuple[int, ...]) -> bool:
    """Whether a bucket ended where the config says. Else the text or the room did, and both must be looked at again."""
    return after.rows - before.rows >= config.bucket_rows or after.rows in (*stops, config.num_tokens)


def folder_bytes(config: HarvestConfig, widths: list[int], after: HarvestPosition) -> int:
    """What a harvest that ends at `after` takes on disk, records included: never less than that, and hardly more [bytes]."""
    context = config.text.context
    total = 2 * RECORD_BYTES
    for width in (*widths, None):
        is_tokens = width is None
        layout = token_layout(1, context) if is_tokens else activation_layout(1, width, config.dtype)
        row_bytes = layout.num_bytes - len(layout.header)
        body = row_bytes * (after.blocks if is_tokens else after.rows)
        numbers = 0 if is_tokens else NUMBER_BYTES * (width + 2 * context) + record_bytes(width)
        # Headers are padded to 4 KiB and stay within it; a line in the sidecar for each block of 4 MiB, begun or full.
        each = len(layout.header) + numbers + RECORD_BYTES + NUMBER_BYTES
        total += body + body // BLOCK_BYTES * NUMBER_BYTES + each * after.bucket
        total += numbers + RECORD_BYTES + 2 * len(json.dumps(config.record(), indent=2))
    return total


def _bucket(before: HarvestPosition, blocks: list[Block], wanted: int) -> Bucket:
    mask = np.stack([block.mask for block in blocks])
    mask &= np.cumsum(mask).reshape(mask.shape) <= wanted
    after = HarvestPosition(before.bucket + 1, before.blocks + len(blocks), before.rows + int(mask.sum()), blocks[-1].after)
    return Bucket(before, after, np.stack([block.input_ids for block in blocks]), mask)
