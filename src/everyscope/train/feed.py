"""Batches ahead of the trainer: read by another thread and, for a GPU, copied while it computes.

To a GPU go the numbers of one site as shards hold them, two bytes each where these are bfloat16, from page-locked memory that is
filled again and again; there they become float32. Nothing is rounded on the way.
"""

from collections import deque
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.local import LocalSource
from everyscope.activations.stream.source import Source
from everyscope.sae.threads import single_threaded_pool

AHEAD = {"cuda": 3}
"""Batches under way while one is in use, by type of device; elsewhere one, for what reads them takes time from what computes."""
Sides = tuple[Float[Tensor, "rows _"], ...]
"""A tensor for each site of a source, whose rows belong together."""


def batches(
    source: Source | Aligned, first: int, stop: int, rows: int, device: torch.device, part: int = 0, parts: int = 1
) -> Iterator[Sides]:
    """Batches `first` to `stop` (excluded) of raw activations, on `device`; the next ones are under way while one is in use.

    A batch has a tensor for each site of `source`, whose rows belong together; on a CPU they are float32.

    Of several replicas each takes its part of the batch's `rows`, which must divide by `parts`, and reads no others.
    """
    assert rows % parts == 0, f"rows={rows}, parts={parts}"
    ahead = AHEAD.get(device.type, 1)
    copier = Copier(source, rows // parts, device, ahead + 1) if device.type == "cuda" else None

    def fetch(step: int) -> tuple[Sides, torch.cuda.Event | None]:
        number = step * parts + part
        if copier is not None:
            return copier.fetch(number)
        return tuple(side.to(device) for side in sides_of(source, number, rows // parts)), None

    with single_threaded_pool(1) as reader:  # cores are for the trainer
        under_way = deque(reader.submit(fetch, step) for step in range(first, min(first + ahead, stop)))
        for step in range(first, stop):
            batch, arrival = under_way.popleft().result()
            if step + ahead < stop:
                under_way.append(reader.submit(fetch, step + ahead))
            if arrival is not None:
                torch.cuda.current_stream(device).wait_event(arrival)
                for side in batch:
                    side.record_stream(torch.cuda.current_stream(device))  # else its memory could be the next copy's at once
            yield batch


def sides_of(source: Source | Aligned, number: int, rows: int) -> Sides:
    """Batch `number` of every site."""
    return source.rows(number, rows) if isinstance(source, Aligned) else (source.batch(number, rows),)


class Copier:
    """Reads batches into page-locked memory and copies them to a GPU on a stream of its own."""

    def __init__(self, source: Source | Aligned, rows: int, device: torch.device, places: int) -> None:
        """Memory for `places` batches."""
        self._source, self._rows, self._device = source, rows, device
        self._copies = torch.cuda.Stream(device)  # of its own: a copy need not wait for the step that is computing
        dtype = source.row_dtype if isinstance(source, LocalSource) else torch.float32
        sizes = [side.d_in for side in (source.sources if isinstance(source, Aligned) else (source,))]
        self._places = [[torch.empty(rows, size, dtype=dtype, pin_memory=True) for size in sizes] for _ in range(places)]
        self._copied: list[torch.cuda.Event | None] = [None] * places
        self._next = 0

    def fetch(self, number: int) -> tuple[Sides, torch.cuda.Event]:
        """A batch that is being copied to the device, and the event of its arrival."""
        at, self._next = self._next, (self._next + 1) % len(self._places)
        if before := self._copied[at]:
            before.synchronize()  # what is to be overwritten has left
        place = self._places[at]
        if isinstance(self._source, LocalSource):
            self._source.batch_into(number, place[0])
        else:
            for side, values in zip(place, sides_of(self._source, number, self._rows), strict=True):
                side.copy_(values)
        with torch.cuda.stream(self._copies):
            batch, arrival = tuple(side.to(self._device, non_blocking=True) for side in place), torch.cuda.Event()
            arrival.record(self._copies)
        self._copied[at] = arrival
        return batch, arrival
