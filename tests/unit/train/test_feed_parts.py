"""Replicas take the parts of a batch: together the rows of one, in order, and none reads another's."""

import pytest
import torch

from everyscope.train.feed import batches


class Numbered:
    """A source whose rows hold their own number."""

    d_in, num_rows, scale, identity = 1, 10, 1.0, "numbered"

    def batch(self, step: int, rows: int) -> torch.Tensor:
        return torch.arange(step * rows, (step + 1) * rows, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_make_up_the_batch(parts):
    whole = [batch for (batch,) in batches(Numbered(), 2, 5, 12, torch.device("cpu"))]
    pieces = [[batch for (batch,) in batches(Numbered(), 2, 5, 12, torch.device("cpu"), part, parts)] for part in range(parts)]
    for step, want in enumerate(whole):
        assert torch.equal(torch.cat([piece[step] for piece in pieces]), want)
        assert all(len(piece[step]) == 12 // parts for piece in pieces)
