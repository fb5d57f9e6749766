"""Batches come in order, one ahead, and an error of the reader reaches the trainer."""

import threading

import pytest
import torch

from everyscope.base.errors import DamagedData
from everyscope.train.feed import batches


class Counting:
    """A source whose batches hold their own number; from `broken` on it cannot be read."""

    d_in, num_rows, scale, identity = 1, 10, 1.0, "counting"

    def __init__(self, broken: int = 10**9) -> None:
        self.broken, self.asked, self.threads = broken, [], set()

    def batch(self, step: int, rows: int) -> torch.Tensor:
        self.asked.append(step)
        self.threads.add(threading.get_ident())
        if step >= self.broken:
            raise DamagedData(f"shard of step {step}")
        return torch.full((rows, 1), float(step))


def test_batches_come_in_order_and_one_ahead():
    source, seen = Counting(), []
    for (batch,) in batches(source, 3, 9, 4, torch.device("cpu")):
        seen.append(batch[0, 0].item())
        assert len(batch) == 4
        assert max(source.asked) <= seen[-1] + 1
    assert seen == source.asked == [3, 4, 5, 6, 7, 8]
    assert threading.get_ident() not in source.threads


def test_nothing_is_read_where_nothing_is_left():
    source = Counting()
    assert list(batches(source, 5, 5, 4, torch.device("cpu"))) == []
    assert source.asked == []


def test_a_damaged_shard_stops_training_at_its_own_step():
    feed = batches(Counting(broken=2), 0, 5, 1, torch.device("cpu"))
    assert [next(feed)[0].item(), next(feed)[0].item()] == [0.0, 1.0]
    with pytest.raises(DamagedData, match="step 2"):
        next(feed)
