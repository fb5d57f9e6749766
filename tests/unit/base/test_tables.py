"""Sealed tables: equal ones have equal bytes, no bit changes unseen, and nothing is read beyond bounds."""

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from everyscope.base import tables
from everyscope.base.errors import DamagedData
from everyscope.base.tables import check_table, opened_table, read_table, write_table

TABLE = pyarrow.table(
    {
        "latent": pyarrow.array(range(100), pyarrow.int32()),
        "share": pyarrow.array([number / 100 for number in range(100)], pyarrow.float32()),
        "ids": pyarrow.array([[number] * (number % 3) for number in range(100)], pyarrow.list_(pyarrow.int32())),
    }
)


def test_what_is_written_is_read_and_equal_tables_have_equal_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_table(tmp_path / name, TABLE, row_group_size=16)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert pyarrow.parquet.read_table(tmp_path / "a").equals(TABLE)  # anybody's reader reads it
    read = read_table(tmp_path / "a", ["ids", "latent"], "again", {"latent": pyarrow.int64()})
    assert read.equals(pyarrow.table({"ids": TABLE["ids"], "latent": TABLE["latent"].cast(pyarrow.int64())}))


def test_no_bit_changes_unseen(tmp_path: Path):
    path, random_ = tmp_path / "a.parquet", random.Random(0)
    write_table(path, TABLE)
    good = path.read_bytes()
    for _ in range(60):
        bad = bytearray(good)
        bad[random_.randrange(len(bad))] ^= 1 << random_.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(DamagedData, match=r"a\.parquet.*; again"):
            check_table(path, "again")


def test_what_has_no_seal_is_refused(tmp_path: Path):
    pyarrow.parquet.write_table(TABLE, tmp_path / "a.parquet")
    with pytest.raises(DamagedData, match="has no checksum"):
        opened_table(tmp_path / "a.parquet", "again")


def test_what_is_missing_or_of_another_type_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_table(path, TABLE)
    with pytest.raises(DamagedData, match="has no column 'label'"):
        read_table(path, ["latent", "label"], "again")
    with pytest.raises(DamagedData, match=r"a\.parquet: cannot be read as Parquet"):
        read_table(path, ["ids"], "again", {"ids": pyarrow.float32()})


def test_a_table_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By what its file says of its groups, and by what they turn out to take: a dictionary spells a long text again and again."""
    path = tmp_path / "bomb.parquet"
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 3000, pyarrow.int32()), ["x" * 1000])
    write_table(path, pyarrow.table({"text": texts.cast(pyarrow.string())}))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 1 << 20)
    with pytest.raises(DamagedData, match=r"takes more than 1\.0 MiB in memory"):
        read_table(path, ["text"], "again")
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", 10_000)
    with pytest.raises(DamagedData, match=r"a group of its rows would take 23\.4 KiB"):
        read_table(path, ["text"], "again")
