"""The text of a harvest, cut into buckets: the rows that are shuffled together and make one shard at every site.

A bucket is known in full before the model runs, so the place of each of its rows in the shard is known too, and rows can
be written to their places as they come. Nothing larger than a batch of activations is ever in memory.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from everyscope.harvest.config import HarvestConfig
from everyscope.shards.order import permutation
from everyscope.text.blocks import Block, Cursor, read_blocks


@dataclass(frozen=True)
class Place:
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
    def of_json(cls, value: dict[str, int]) -> "Place":
        """The place that a sidecar keeps."""
        return cls(value["bucket"], value["blocks"], value["rows"], Cursor(value["documents"], value["tokens"]))


@dataclass(frozen=True)
class Bucket:
    """Whole blocks of text with at least `bucket_rows` positions that count, unless the harvest ends first."""

    before: Place
    after: Place
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
        return permutation(self.num_rows, seed, self.before.bucket)


def read_buckets(config: HarvestConfig, tokenizer: Any, start: Place) -> Iterator[Bucket]:
    """The buckets from `start` on, until there are `num_tokens` rows or the text ends; TextError where there is no text."""
    fresh = start == Place()
    blocks = read_blocks(config.text, tokenizer, "train", None if fresh else start.cursor)
    place, gathered, rows = start, [], 0
    for block in blocks if place.rows < config.num_tokens else ():
        gathered.append(block)
        rows += int(block.mask.sum())
        if rows >= min(config.bucket_rows, config.num_tokens - place.rows):
            bucket = _bucket(place, gathered, config.num_tokens - place.rows)
            yield bucket
            place, gathered, rows = bucket.after, [], 0
            if place.rows >= config.num_tokens:
                return
    if rows:
        yield _bucket(place, gathered, config.num_tokens - place.rows)


def _bucket(before: Place, blocks: list[Block], wanted: int) -> Bucket:
    mask = np.stack([block.mask for block in blocks])
    mask &= np.cumsum(mask).reshape(mask.shape) <= wanted
    after = Place(before.bucket + 1, before.blocks + len(blocks), before.rows + int(mask.sum()), blocks[-1].after)
    return Bucket(before, after, np.stack([block.input_ids for block in blocks]), mask)
