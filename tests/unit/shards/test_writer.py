import numpy as np
import pytest
import torch

from everyscope.base.errors import NonFinite, ShapeMismatch
from everyscope.shards.writer import new_activation_shard


def put(folder, rows, expected):
    places = np.arange(len(rows))
    with new_activation_shard(folder / "shard_00000.safetensors", "mlp_out layer 1", expected, 3, "bfloat16", 8, {}) as writer:
        writer.put(rows, places, 40 + places, places)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), NonFinite, "mlp_out layer 1, block 41, position 1: NaN"),
        (torch.tensor([[0.0, 3.4e38, 0], [0, 0, 0]]), NonFinite, "block 40, position 0"),  # finite, but not in bfloat16
        (torch.zeros(2, 4), ShapeMismatch, r"mlp_out layer 1: rows of shape \(2, 4\), expected \(2, 3\)"),
        (torch.zeros(1, 3), AssertionError, "1 rows put, 2 expected"),
    ],
)
def test_an_error_leaves_no_file(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        put(tmp_path, rows, expected=2)
    assert not list(tmp_path.iterdir())


def test_the_sidecar_of_a_deleted_shard_commits_nothing(tmp_path):
    put(tmp_path, torch.zeros(2, 3), expected=2)
    (tmp_path / "shard_00000.safetensors").unlink()
    with pytest.raises(NonFinite):
        put(tmp_path, torch.full((2, 3), torch.inf), expected=2)
    assert not list(tmp_path.iterdir())
