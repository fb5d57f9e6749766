from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from everyscope.activations.shards import opened, reader
from everyscope.activations.shards.checksums import BLOCK_BYTES, block_checksum
from everyscope.activations.shards.manifest import shard_path, sidecar_path
from everyscope.activations.shards.reader import Shards, TokenBlocks
from everyscope.base.errors import DamagedData, DataError, ShapeMismatch
from tests.unit.activations.shards.conftest import D_IN, SIZES, write_site

RANGES = [(0, 0), (0, 1), (0, 104), (36, 38), (37, 101), (100, 102), (5, 104), (104, 104)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_any_range_comes_back_bit_by_bit(written, dtype, start, stop):
    shards = Shards(written.folder)
    rows = shards.rows(start, stop)
    assert rows.dtype == getattr(torch, dtype)
    assert torch.equal(rows, written.rows[start:stop])
    assert torch.equal(shards.sequence(start, stop), written.sequence[start:stop])
    assert torch.equal(shards.position(start, stop), written.position[start:stop])


def test_what_it_says_of_itself(written, dtype):
    shards = Shards(written.folder)
    assert (shards.site, shards.d_in, shards.num_rows, shards.dtype) == ("resid_post/layer_3", D_IN, sum(SIZES), dtype)
    assert shards.manifest.parents == {"model": "none"}


@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_rows_are_converted_on_the_way(written, into, start, stop):
    shards, rows = Shards(written.folder), torch.full((stop - start, D_IN), 7, dtype=into)
    shards.prepare(start, stop)
    shards.rows_into(start, stop, rows)
    assert torch.equal(rows, written.rows[start:stop].to(into))
    with pytest.raises(ShapeMismatch, match="to fill"):
        shards.rows_into(start, stop, torch.empty(stop - start + 1, D_IN))


def test_threads_may_read_at_once(written):
    shards = Shards(written.folder)

    def reads(number: int) -> bool:
        start = number % 100
        shards.prepare(start, 104)
        return torch.equal(shards.rows(start, start + 4), written.rows[start : start + 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(reads, range(400)))


def test_damage_met_ahead_is_told_by_whoever_reads_it(written):
    path = shard_path(written.folder, 1)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    shards = Shards(written.folder)
    shards.prepare(0, 104)
    shards.rows(0, 37)
    with pytest.raises(DamagedData, match="shard_00001"):
        shards.rows(0, 38)


def test_a_block_is_checked_once_even_if_its_shard_was_closed_in_between(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 1)
    made = write_site(tmp_path, "float32")
    counted = []
    monkeypatch.setattr(opened, "block_checksum", lambda block: counted.append(1) or block_checksum(block))
    shards = Shards(made.folder)
    for _ in range(3):
        assert torch.equal(shards.rows(0, 104), made.rows)
    assert len(counted) == 3
    path = shard_path(made.folder, 0)
    path.rename(tmp_path / "old")
    path.write_bytes((tmp_path / "old").read_bytes()[:-1] + b"!")  # another file of that name is another matter
    with pytest.raises(DamagedData, match="shard_00000"):
        shards.rows(0, 37)


def test_rows_are_a_copy(written):
    shards = Shards(written.folder)
    shards.rows(0, 5).zero_()
    assert torch.equal(shards.rows(0, 5), written.rows[:5])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 105)])
def test_rows_that_are_not_there_are_refused(written, start, stop):
    with pytest.raises(ShapeMismatch, match="holds 104"):
        Shards(written.folder).rows(start, stop)


def test_identity_is_that_of_the_content(tmp_path):
    same = [write_site(tmp_path / name, "float32").folder for name in "ab"]
    other = write_site(tmp_path / "c", "float32", sizes=(37, 64)).folder
    identities = [Shards(folder).identity for folder in (*same, other)]
    assert identities[0] == identities[1] != identities[2]


def test_few_shards_stay_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    made = write_site(tmp_path, "float32", sizes=(3,) * 9)
    shards = Shards(made.folder)
    for _ in range(2):
        assert torch.equal(shards.rows(0, 27), made.rows)
        assert len(shards._files._open) == 2


def test_only_the_damaged_block_is_refused(tmp_path):
    made = write_site(tmp_path, "float32", sizes=(3000,), d_in=1024)
    path = shard_path(made.folder, 0)
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 17)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    shards = Shards(made.folder)
    assert torch.equal(shards.rows(0, 1000), made.rows[:1000])
    for _ in range(2):
        with pytest.raises(DamagedData, match=r"shard_00000\.safetensors: block 1 "):
            shards.rows(0, 3000)
    assert torch.equal(shards.rows(2999, 3000), made.rows[2999:])


def test_a_changed_sidecar_is_refused(written):
    sidecar = sidecar_path(shard_path(written.folder, 1))
    sidecar.write_text(sidecar.read_text() + " ")
    shards = Shards(written.folder)
    shards.rows(0, 37)
    with pytest.raises(DamagedData, match=r"shard_00001"):
        shards.rows(37, 38)


def test_tokens_and_activations_are_not_mixed_up(written, tokens):
    folder, blocks = tokens
    opened = TokenBlocks(folder)
    assert (opened.num_blocks, opened.context) == tuple(blocks.shape)
    assert torch.equal(opened.input_ids(2, 6), blocks[2:6])
    with pytest.raises(DataError, match="expected activations"):
        Shards(folder)
    with pytest.raises(DataError, match="expected tokens"):
        TokenBlocks(written.folder)


def test_an_unfinished_folder_is_refused(written):
    (written.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        Shards(written.folder)
    (written.folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="version: Field required"):
        Shards(written.folder)
