import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everyscope.activations.shards.format import activation_layout, create_shard, open_shard, token_layout
from everyscope.activations.shards.manifest import shard_path
from everyscope.base.errors import DamagedData


def test_public_package_reads_the_same_tensors(written, tokens, dtype):
    parts = [load_file(path) for path in sorted(written.folder.glob("*.safetensors"))]
    assert set(parts[0]) == {"activations", "sequence", "position"}
    for name, want in (("activations", written.rows), ("sequence", written.sequence), ("position", written.position)):
        got = torch.cat([part[name] for part in parts])
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    folder, blocks = tokens
    with safe_open(shard_path(folder, 1), "pt") as file:
        assert torch.equal(file.get_tensor("input_ids"), blocks[4:])


@pytest.mark.parametrize(
    "layout", [activation_layout(3, 5, "bfloat16"), activation_layout(10**9, 4608, "float32"), token_layout(2, 8)]
)
def test_header_is_padded_to_4_kib_and_accounts_for_every_byte(layout):
    header = layout.header
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    ends = [value["data_offsets"][1] for name, value in json.loads(header[8:]).items() if name != "__metadata__"]
    assert max(ends) == layout.num_bytes - len(header) == sum(tensor.num_bytes for tensor in layout.tensors)


def test_a_file_of_another_shape_is_refused_by_name(tmp_path):
    path = tmp_path / "shard.safetensors"
    create_shard(path, token_layout(2, 8))
    for other in (token_layout(2, 9), token_layout(4, 4)):
        with pytest.raises(DamagedData, match=r"shard\.safetensors"):
            open_shard(path, other)
    with pytest.raises(DamagedData, match="missing"):
        open_shard(tmp_path / "none", token_layout(2, 8))
