"""Hostile tables, sealed as ours are: each is refused by name, whatever it does to the process that reads it."""

import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from everyscope.base import table_trial
from everyscope.base.errors import DamagedData, EveryscopeError
from everyscope.base.table_trial import Tried
from everyscope.base.tables import UNSEALED, _seal, write_table

TABLE = pyarrow.table({"latent": pyarrow.array(range(512), pyarrow.int32()), "label": [f"of {number}" for number in range(512)]})


def forged(path: Path, old: bytes, new: bytes) -> Path:
    """A sealed table with some of its bytes exchanged, and sealed again."""
    write_table(path, TABLE, compression="none", use_dictionary=False)
    content = path.read_bytes()
    assert old in content
    held = re.search(rb"checksum\x18\x20([0-9a-f]{32})", content)
    path.write_bytes(content.replace(old, new).replace(held.group(1), UNSEALED.encode()))
    _seal(path)
    return path


def refused(tried: Tried, path: Path) -> str:
    with pytest.raises(DamagedData, match=re.escape(str(path))) as caught:
        tried.require(path)
    message = str(caught.value)
    assert message.endswith("; download it")
    assert "\n" not in message
    return message


def test_hostile_tables_are_refused_and_whole_ones_are_not(tmp_path: Path):
    good, plain, bomb, other = (tmp_path / f"{name}.parquet" for name in ("good", "plain", "bomb", "other"))
    for path in (good, other):
        write_table(path, TABLE)
    pyarrow.parquet.write_table(TABLE, plain)
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256, pyarrow.int32()), ["x" * 540_000])
    write_table(bomb, pyarrow.table({"text": texts.cast(pyarrow.large_string())}))
    name = forged(tmp_path / "name.parquet", b"label", b"l\xffbel")
    text = forged(tmp_path / "text.parquet", b"of 77", b"of \xff7")
    length = forged(tmp_path / "length.parquet", b"\x05\x00\x00\x00of 77", b"\xff\xff\xff\x7fof 77")
    tried = Tried([good, plain, bomb, name, text, length, other], "download it")
    for path in (good, other, tmp_path / "never_tried.parquet"):
        tried.require(path)
    assert "has no checksum" in refused(tried, plain)
    assert "of its rows take more than 128.0 MiB" in refused(tried, bomb)
    for path in (name, text, length):
        assert "cannot be read as Parquet" in refused(tried, path)


def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let a shell script stand for the process that reads."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize(("sign", "words"), [("SEGV", "ends the process that reads it (SIGSEGV)"), ("ALRM", "takes far longer")])
def test_a_table_that_ends_its_reader_is_refused_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str, words: str
):
    """The first process dies at the second table, the next one reads the rest."""
    paths = [tmp_path / f"{number}.parquet" for number in range(4)]
    once = f"echo ready; if mkdir {tmp_path}/begun 2>/dev/null; then echo null; kill -{sign} $$; else echo null; echo null; fi"
    interpreter(tmp_path, monkeypatch, once)
    tried = Tried(paths, "download it")
    assert words in refused(tried, paths[1])
    for path in (paths[0], *paths[2:]):
        tried.require(path)


def test_tables_behind_many_that_end_their_reader_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table_trial, "MAX_DEATHS", 2)
    interpreter(tmp_path, monkeypatch, "echo ready; kill -SEGV $$")
    paths = [tmp_path / f"{number}.parquet" for number in range(4)]
    tried = Tried(paths, "download it")
    assert ["SIGSEGV" in refused(tried, path) for path in paths] == [True, True, False, False]


def test_a_reader_that_cannot_begin_is_no_fault_of_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interpreter(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(EveryscopeError, match="ended with 3 before it began"):
        Tried([tmp_path / "a.parquet"], "download it")
