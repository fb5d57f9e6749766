"""Harvest without a disk: buckets of activations made when they are asked for, for a server that keeps them in memory.

The same config gives the same rows in the same order as a harvest writes them. Only the statistics differ a little: those of
the first bucket are taken, before the others are known. A bucket that is asked for again is made again, to the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.harvest.bucket_index import LIVE_FILE, changed_text, find_bucket_index, record_of, write_bucket_index
from everyscope.activations.harvest.buckets import Bucket, read_buckets
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.massive import tell_massive
from everyscope.activations.harvest.model_handle import Capture, ModelHandle, model_identity, open_handle
from everyscope.activations.shards.bits import TORCH_DTYPE, carrier_of
from everyscope.activations.shards.format import RowDtype
from everyscope.activations.shards.statistics import Statistics, StatisticsRecord, Sums
from everyscope.base.errors import ConfigError, NonFinite
from everyscope.base.progress import say
from everyscope.sites.names import Site


class LiveHarvest:
    """The buckets of a harvest, one at a time, from one thread."""

    def __init__(
        self,
        config: HarvestConfig,
        identity: str | None = None,
        open_handle: Callable[[HarvestConfig], ModelHandle] = open_handle,
    ) -> None:
        """Read the text ahead, if no file in `config.out` says where buckets end. Raises what `harvest.run` does before it runs.

        `identity` is the model's; None takes its fingerprint. ConfigError for a partition: slices are the server's matter.
        """
        if config.partition != (0, 1):
            raise ConfigError(f"partition={config.partition}: is for shards; leave it out, and give servers slices instead")
        self.config, self._handle = config, open_handle(config)
        self._bucket_index = find_bucket_index(config, identity or model_identity(config.model), self._handle.tokenizer)
        self._places = self._bucket_index.places
        self._coming: Iterator[Bucket] = iter(())
        self._next = -1

    @property
    def identity(self) -> str:
        """A content id of all rows: of config and model, and of the tokens."""
        return self._bucket_index.identity

    @property
    def dtype(self) -> RowDtype:
        """Number format of the rows."""
        return self.config.dtype

    @property
    def widths(self) -> dict[str, int]:
        """Size of the activations by site, as resid_post/layer_2 [d_in]."""
        return {site.folder: width for site, width in self._handle.widths.items()}

    @property
    def borders(self) -> list[int]:
        """The row at which each bucket begins, and the one at which the last ends [rows]."""
        return [place.rows for place in self._places]

    @property
    def statistics(self) -> Mapping[str, Statistics]:
        """Figures of the first bucket's rows, by site. Measured once, then read from the file."""
        if self._bucket_index.statistics is None:
            say("live: the model runs over the first bucket, for the statistics of each site")
            measured = self._bucket_index.model_copy(update={"statistics": self._measure(self._bucket(0))})
            write_bucket_index(self.config.out / LIVE_FILE, measured)
            self._bucket_index = measured
            self._tell_massive()
        assert self._bucket_index.statistics is not None
        return {site: Statistics.of_record(record) for site, record in self._bucket_index.statistics.items()}

    def rows(self, bucket: int) -> dict[str, np.ndarray]:
        """Rows of a bucket at every site, shuffled, in the carrier type [rows, d_in].

        TextError where the text is not what it was when it was read ahead; NonFinite, naming site, block and position.
        """
        found = self._bucket(bucket)
        places, done = torch.from_numpy(found.places(self.config.seed).astype(np.int64)), 0
        dtype = TORCH_DTYPE[self.dtype]
        tables = {site: torch.empty(found.num_rows, width, dtype=dtype) for site, width in self._handle.widths.items()}
        for batch in self._batches(found):
            where = places[done : done + len(next(iter(batch.values())))]
            for site, table in tables.items():
                table[where] = batch[site]
            done += len(where)
        assert done == found.num_rows, f"bucket {bucket}: {done} rows made, {found.num_rows} expected"
        return {site.folder: carrier_of(table) for site, table in tables.items()}

    @cached_property
    def _capture(self) -> Capture:
        return self._handle.open()

    def _bucket(self, number: int) -> Bucket:
        """The text of a bucket; the next one is quick to read, a jump skips through the documents."""
        if number != self._next:
            self._coming = read_buckets(self.config, self._handle.tokenizer, self._places[number])
        self._next = -1  # until we know that reading can continue here
        bucket = next(self._coming, None)
        if bucket is None or record_of(bucket) != self._bucket_index.buckets[number]:
            raise changed_text(self.config)
        self._next = number + 1
        return bucket

    def _batches(self, bucket: Bucket) -> Iterator[dict[Site, Float[Tensor, "rows d_in"]]]:
        """The rows of the bucket in reading order, some blocks at a time, as they are to be stored."""
        for start in range(0, len(bucket.input_ids), self.config.batch_blocks):
            batch = slice(start, start + self.config.batch_blocks)
            taken = np.flatnonzero(bucket.mask[batch])
            activations = self._capture(self.config.sites, torch.from_numpy(bucket.input_ids[batch].astype(np.int64)))
            first_block = bucket.before.blocks + start
            yield {site: self._stored(activations[site], taken, site, first_block) for site in self.config.sites}

    def _stored(
        self, activations: Float[Tensor, "batch ctx d_in"], taken: np.ndarray, site: Site, first_block: int
    ) -> Float[Tensor, "rows d_in"]:
        chosen = torch.from_numpy(taken).to(activations.device)
        rows = activations.flatten(0, 1)[chosen].to(TORCH_DTYPE[self.dtype]).cpu()
        is_finite = torch.isfinite(rows).all(1)
        if not is_finite.all():
            block, position = divmod(int(taken[int(is_finite.long().argmin())]), self.config.text.context)
            place = f"{site.folder}, block {first_block + block}, position {position}"
            raise NonFinite(f"{place}: NaN or infinity, expected finite activations; run the model in float32")
        return rows

    def _tell_massive(self) -> None:
        ids = self._bucket(0).input_ids
        for site, statistics in self.statistics.items():
            tell_massive(site, statistics, lambda block, position: self._handle.tokenizer.decode([int(ids[block, position])]))

    def _measure(self, bucket: Bucket) -> dict[str, StatisticsRecord]:
        context, done = self.config.text.context, 0
        sums = {site: Sums(width, context) for site, width in self._handle.widths.items()}
        blocks, positions = bucket.mask.nonzero()
        for batch in self._batches(bucket):
            some = slice(done, done + len(next(iter(batch.values()))))
            for site, total in sums.items():
                total.add(batch[site].float().numpy(), positions[some], bucket.before.blocks + blocks[some])
            done = some.stop
        return {site.folder: total.statistics().record() for site, total in sums.items()}
