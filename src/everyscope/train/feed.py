"""Batches a step ahead of the trainer: read by another thread and, for a GPU, copied while it computes."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.source import Source
from everyscope.sae.threads import single_threaded_pool


def batches(
    source: Source | Aligned, first: int, stop: int, rows: int, device: torch.device, part: int = 0, parts: int = 1
) -> Iterator[tuple[Float[Tensor, "rows _"], ...]]:
    """Batches `first` to `stop` (excluded) of raw activations, on `device`; the next one is under way while one is in use.

    A batch has a tensor for each site of `source`, whose rows belong together.

    Of several replicas each takes its part of the batch's `rows`, which must divide by `parts`, and reads no others.
    """
    assert rows % parts == 0, f"rows={rows}, parts={parts}"
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fetch(step: int) -> tuple[tuple[Tensor, ...], torch.cuda.Event | None]:
        place = (step * parts + part, rows // parts)
        batch = source.rows(*place) if isinstance(source, Aligned) else (source.batch(*place),)
        if copies is None:
            return tuple(side.to(device) for side in batch), None
        with torch.cuda.stream(copies):  # a stream of its own: the copy need not wait for the step that is computing
            on_device = tuple(side.pin_memory().to(device, non_blocking=True) for side in batch)
            arrival = torch.cuda.Event()
            arrival.record(copies)
            return on_device, arrival

    with single_threaded_pool(1) as reader:  # cores are for the trainer
        ahead = reader.submit(fetch, first) if first < stop else None
        for step in range(first, stop):
            assert ahead is not None
            batch, arrival = ahead.result()
            ahead = reader.submit(fetch, step + 1) if step + 1 < stop else None
            if arrival is not None:
                torch.cuda.current_stream(device).wait_event(arrival)
                for side in batch:
                    side.record_stream(torch.cuda.current_stream(device))  # else its memory could be the next copy's at once
            yield batch
