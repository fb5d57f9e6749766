import json
import os

import pytest

from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import DamagedData, DataError


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_whole_shards_pass_alone_and_from_the_root(written, tokens, tmp_path):
    verify_shards(written.folder)
    verify_shards(tmp_path / "shards")


@pytest.mark.parametrize("offset", [0, 9, 4095, 4096, 4500, -1])
def test_a_flipped_byte_is_named(written, tokens, tmp_path, offset):
    flip(written.folder / "shard_00001.safetensors", offset)
    for folder in (written.folder, tmp_path / "shards"):
        with pytest.raises(DamagedData, match=r"layer_3/shard_00001\.safetensors: block 0 "):
            verify_shards(folder)


def test_tokens_are_verified_too(written, tokens, tmp_path):
    flip(tokens[0] / "shard_00000.safetensors", -3)
    with pytest.raises(DamagedData, match=r"tokens/shard_00000\.safetensors"):
        verify_shards(tmp_path / "shards")


def test_short_long_missing_and_foreign_files_are_named(written):
    path = written.folder / "shard_00002.safetensors"
    data = path.read_bytes()
    for wrong in (data[:-1], data + b"\0"):
        path.write_bytes(wrong)
        with pytest.raises(DamagedData, match=r"shard_00002\.safetensors: holds"):
            verify_shards(written.folder)
    path.unlink()
    with pytest.raises(DamagedData, match=r"shard_00002\.safetensors: the shard is missing"):
        verify_shards(written.folder)
    path.write_bytes(data)
    (written.folder / "shard_00003.safetensors").write_bytes(data)
    with pytest.raises(DamagedData, match=r"shard_00003\.safetensors: is not in the manifest"):
        verify_shards(written.folder)


@pytest.mark.parametrize(
    ("name", "field"),
    [("manifest.json", "num_rows"), ("manifest.json", "d_in"), ("statistics.json", "scale"), ("shard_00000.json", "rows")],
)
def test_records_that_disagree_are_named(written, name, field):
    path = written.folder / name
    value = json.loads(path.read_text())
    value[field] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(DamagedData, match=name):
        verify_shards(written.folder)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_first_damaged_file_is_named_however_many_are_read_at_once(written, workers):
    for index in (2, 0, 1):
        flip(written.folder / f"shard_{index:05d}.safetensors", -1)
    with pytest.raises(DamagedData, match="shard_00000"):
        verify_shards(written.folder, workers)


def test_files_of_other_times_are_as_good(written):
    for number, path in enumerate(sorted(written.folder.iterdir())):
        os.utime(path, (number * 10**9, (5 - number) * 10**9))
    verify_shards(written.folder)
    Shards(written.folder).rows(0, 104)


def test_shards_without_a_manifest_have_not_been_finished(written, tmp_path):
    (written.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        verify_shards(tmp_path / "shards")


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no shards"):
        verify_shards(tmp_path)
