"""Filling a bucket's shards: the model runs in one thread, and others put the batch before into the shards. The bucket before is
on its way to the disk meanwhile.

So two batches of activations and two buckets are in memory, and the model waits only for a writer or a disk that is slower than
itself. Where it runs on the CPU, though, it needs every core: threads beside it would hold up all of its own, which wait for one
another, for as long as they run. There model and writers take turns, each with all cores, and only the disk works beside them.
What is summed and where it is put do not depend on who is quicker.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from everyscope.activations.harvest.buckets import Bucket
from everyscope.activations.harvest.config import HarvestConfig
from everyscope.activations.harvest.model_handle import Capture
from everyscope.activations.harvest.timings import Timings
from everyscope.activations.shards.format import Layout, activation_layout
from everyscope.activations.shards.memory import RecycledMemory
from everyscope.activations.shards.writer import ActivationWriter, new_activation_shard
from everyscope.base.progress import Meter
from everyscope.sites.names import Site

Writers = dict[Site, ActivationWriter]
Item = TypeVar("Item")


def open_writers(
    paths: dict[Site, Path],
    widths: dict[Site, int],
    bucket: Bucket,
    config: HarvestConfig,
    memory: RecycledMemory,
    stack: ExitStack,
) -> Writers:
    """A shard of `bucket` for each site, open until `stack` is closed, and committed then."""
    layouts = [activation_layout(bucket.num_rows, widths[site], config.dtype) for site in paths]
    room = config.shuffle_bytes // 2  # the bucket before may still be on its way to the disk
    return {
        site: stack.enter_context(
            new_activation_shard(
                path,
                name=str(site),
                rows=bucket.num_rows,
                d_in=widths[site],
                dtype=config.dtype,
                context=config.text.context,
                after=bucket.after.as_json(),
                segment_rows=rows,
                memory=memory,
            )
        )
        for (site, path), rows in zip(paths.items(), segment_rows(layouts, room), strict=True)
    }


def segment_rows(layouts: list[Layout], shuffle_bytes: int) -> list[int | None]:
    """How shards that are written together are shuffled: straight (None) if all fit in so much memory, else by segments.

    As many segments, each with its copy, as there are threads fit in that memory then.
    """
    if sum(layout.num_bytes for layout in layouts) <= shuffle_bytes:
        return [None] * len(layouts)
    segment_bytes = shuffle_bytes // (2 * torch.get_num_threads())
    return [max(1, segment_bytes // layout.row_bytes("activations")) for layout in layouts]


def fill(writers: Writers, bucket: Bucket, config: HarvestConfig, capture: Capture, progress: Meter, timings: Timings) -> bool:
    """Run the model over the bucket, and put each row where the shuffle wants it; whether the model ran on the CPU."""
    places, done, sites, is_on_cpu = bucket.places(config.seed), 0, tuple(writers), False
    with ThreadPoolExecutor(torch.get_num_threads(), "harvest-writer") as threads:
        writing: list[Future[None]] = []
        for start in range(0, len(bucket.input_ids), config.batch_blocks):
            batch = slice(start, start + config.batch_blocks)
            taken = np.flatnonzero(bucket.mask[batch])
            with timings.spending("forward"):
                activations = capture(sites, torch.from_numpy(bucket.input_ids[batch].astype(np.int64)))
            # Of a model that is spread over devices each site is made on its own block's.
            made = {device: _made(device) for device in {activations[site].device for site in sites}}
            is_on_cpu = any(device.type == "cpu" for device in made)
            _wait(writing, timings)
            where, first = places[done : done + len(taken)], bucket.before.blocks + start
            sequence, position = first + taken // config.text.context, taken % config.text.context

            writing = []
            for site, writer in writers.items():
                rows = activations[site].flatten(0, 1)
                writing.append(threads.submit(_put, writer, rows, where, sequence, position, taken, timings, made[rows.device]))
            if is_on_cpu:
                _wait(writing, timings)
            done += len(taken)
            progress.advance(len(taken))
            timings.tell(len(taken))
        _wait(writing, timings)
    return is_on_cpu


def _made(device: torch.device) -> "torch.cuda.Event | None":
    """An event after everything queued on a GPU so far; None on other devices."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


@contextmanager
def _beside(rows: Tensor, made: "torch.cuda.Event | None") -> Iterator[None]:
    """Work on `rows` on a stream of its own: on the model's, a copy would wait for the next pass, which is queued already."""
    if made is None:
        yield
        return
    stream = torch.cuda.Stream(rows.device)
    stream.wait_event(made)
    rows.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def _wait(writing: list[Future[None]], timings: Timings) -> None:
    with timings.spending("wait"):
        for future in writing:
            future.result()
    writing.clear()


def _put(
    writer: ActivationWriter,
    rows: Tensor,
    where: np.ndarray,
    sequence: np.ndarray,
    position: np.ndarray,
    taken: np.ndarray,
    timings: Timings,
    made: "torch.cuda.Event | None",
) -> None:
    """Put one batch of one site, once it is `made`; `taken` counts through its positions, block by block."""
    before = dict(writer.seconds)
    with _beside(rows, made):
        writer.put(rows, where, sequence, position, taken)
    for part, seconds in writer.seconds.items():
        timings.add(part, seconds - before[part])


def finish(writers: Sequence[ActivationWriter]) -> None:
    """Sum up and write all shards, as many at once as there are threads."""
    _all(ActivationWriter.finish, writers)


def sync(writers: Sequence[ActivationWriter]) -> None:
    """`finish` them, and see them to the disk."""
    _all(ActivationWriter.sync, writers)


def _all(work: Callable[[ActivationWriter], object], writers: Sequence[ActivationWriter]) -> None:
    with ThreadPoolExecutor(torch.get_num_threads(), "harvest-commit") as pool:
        list(pool.map(work, writers))


class Commits:
    """Committing beside everything else, one bucket after another: nobody waits for the disk who has something to do."""

    def __init__(self, timings: Timings) -> None:
        """Nothing under way."""
        self._thread, self._timings = ThreadPoolExecutor(1, "harvest-commit"), timings
        self._last: Future[None] | None = None
        self.memory = RecycledMemory()
        """For shards: once one is committed, its memory is another's."""

    def __enter__(self) -> "Commits":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for what is under way; its error is raised, unless there is another one already."""
        self._thread.shutdown(wait=error is not None)
        if error is None:
            self.wait()

    def wait(self) -> None:
        """Wait for the bucket before, and raise its error."""
        if self._last is not None:
            with self._timings.spending("commit"):
                self._last.result()

    def begin(self, commit: Callable[[], None]) -> None:
        """Commit one more."""
        self._last = self._thread.submit(self._timed, commit)

    def _timed(self, commit: Callable[[], None]) -> None:
        with self._timings.spending("disk"):
            commit()


def ahead(items: Iterator[Item], timings: Timings) -> Iterator[Item]:
    """The items, each one made while the one before is in use; waiting for them is counted as text."""
    with ThreadPoolExecutor(1, "harvest-text") as maker:
        coming = maker.submit(next, items, None)
        while True:
            with timings.spending("text"):
                item = coming.result()
            if item is None:
                return
            coming = maker.submit(next, items, None)
            yield item
