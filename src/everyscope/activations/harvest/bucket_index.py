"""Where the buckets of a live harvest begin and end, found by reading the text once ahead, through the tokenizer alone.

It is kept in `live.json`, with a checksum of every bucket's tokens: a server that restarts serves at once, and a changed text
is noticed before other rows go by the old names. A file that is damaged, or of another harvest, is made again.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from everyscope.activations.harvest.buckets import Bucket, HarvestPosition, read_buckets
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.shards.statistics import StatisticsRecord
from everyscope.base.errors import DataError, TextError
from everyscope.base.files import read_json, write_json
from everyscope.base.ids import content_id
from everyscope.base.progress import meter, say
from everyscope.base.schema import Schema
from everyscope.text.identity import text_identity

LIVE_FILE = "live.json"
"""The file's name, in the folder where a harvest would write its shards."""
SAVED_BUCKETS = 64
"""Interval at which the file is written while the text is read [buckets]."""


class BucketRecord(Schema):
    """One bucket."""

    after: dict[str, int]
    """The place at its end, as `HarvestPosition.as_json` gives it."""
    tokens: str
    """xxh3 of its token ids."""


class BucketIndex(Schema):
    """What is known of a live harvest before the model runs, and the statistics, which need one bucket of it."""

    asked: str
    """Content id of the config and the model."""
    text: str | None = None
    """Identity of the text that was read, where it has one."""
    buckets: tuple[BucketRecord, ...] = ()
    """The buckets found so far."""
    is_whole: bool = False
    """Whether the text was read to its end, or as far as is wanted."""
    statistics: dict[str, StatisticsRecord] | None = None
    """Figures of the first bucket's rows, by site; None until they were measured."""

    @property
    def identity(self) -> str:
        """A content id of all rows: of what makes them, and of the tokens that they are made from."""
        return content_id(["live", self.asked, [bucket.tokens for bucket in self.buckets]])

    @property
    def places(self) -> list[HarvestPosition]:
        """Where each bucket begins, and where the last ends."""
        return [HarvestPosition(), *(HarvestPosition.of_json(bucket.after) for bucket in self.buckets)]


def find_bucket_index(config: HarvestConfig, model: str, tokenizer: Any) -> BucketIndex:
    """The bucket index from the file in `config.out`, or by reading on from where it stops; `model` is the model's identity.

    TextError where there is no text, or where it has changed; StorageError where the folder cannot be written.
    """
    file, asked, text = config.out / LIVE_FILE, content_id([config.record(), model]), text_identity(config.text)
    known = read_bucket_index(file)
    if known is None or known.asked != asked:
        known = BucketIndex(asked=asked, text=text)
    elif text is not None and known.text not in (None, text):
        raise changed_text(config)
    if known.is_whole:
        return known
    found = list(known.buckets)
    place = known.places[-1]
    with meter("read text", config.num_tokens, "tokens") as progress:
        progress.advance(place.rows, is_resumed=True)
        for bucket in read_buckets(config, tokenizer, place):
            found.append(record_of(bucket))
            place = bucket.after
            progress.advance(bucket.num_rows)
            if len(found) % SAVED_BUCKETS == 0:
                write_bucket_index(file, known.model_copy(update={"buckets": tuple(found)}))
    if not found:
        raise TextError(f"{config.text.origin}: the train split has no countable token; give non-empty documents")
    if place.rows < config.num_tokens:
        say(f"live: the text ends after {place.rows} of {config.num_tokens} tokens; then it restarts from the beginning")
    whole = known.model_copy(update={"buckets": tuple(found), "is_whole": True})
    write_bucket_index(file, whole)
    return whole


def changed_text(config: HarvestConfig) -> TextError:
    """The error for a text that is not what the bucket index was made from."""
    return TextError(
        f"{config.text.origin}: changed after it was read for {config.out / LIVE_FILE}; "
        "put it back, or delete that file and start the server again"
    )


def record_of(bucket: Bucket) -> BucketRecord:
    """What the bucket index says of a bucket."""
    return BucketRecord(
        after=bucket.after.as_json(), tokens=xxhash.xxh3_128(np.ascontiguousarray(bucket.input_ids).data).hexdigest()
    )


def read_bucket_index(file: Path) -> BucketIndex | None:
    """What the file says; None where there is no file, or it is not what was written."""
    with suppress(DataError, ValueError):  # pydantic's complaints are ValueErrors too
        value = read_json(file)
        if isinstance(value, dict) and value.pop("check", None) == content_id(value):
            return BucketIndex.model_validate(value)
    return None


def write_bucket_index(file: Path, bucket_index: BucketIndex) -> None:
    """Write the file, with a checksum of itself."""
    value = bucket_index.as_json()
    write_json(file, value | {"check": content_id(value)})
