"""Laws of base.logs: a log that is cut back to a checkpoint continues as if nothing had been written behind it."""

import errno
import json

import pytest

from everyscope.base.errors import DamagedData, StorageError
from everyscope.base.logs import JsonLines


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_cut_back_equals_one_never_interrupted(tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    log = JsonLines(whole)
    for step in range(5):
        log.write({"step": step})
    log.close()

    log = JsonLines(cut)
    log.write({"step": 0})
    log.write({"step": 1})
    checkpoint = log.num_bytes
    log.write({"step": 2, "of": "a run that was killed"})
    log.close()
    with cut.open("a") as file:
        file.write('{"half a li')
    log = JsonLines(cut, keep_bytes=checkpoint)
    assert log.num_bytes == checkpoint
    for step in range(2, 5):
        log.write({"step": step})
    assert log.num_bytes == whole.stat().st_size
    log.close()
    assert cut.read_bytes() == whole.read_bytes()


def test_a_new_log_drops_what_lay_there(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    JsonLines(path).write({"old": 1})
    log = JsonLines(path)
    log.write({"new": 1})
    log.close()
    assert rows(path) == [{"new": 1}]


def test_a_row_can_be_read_at_once(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    log.write({"step": 0})
    assert rows(tmp_path / "log.jsonl") == [{"step": 0}]
    log.close()


def test_a_log_shorter_than_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n')
    with pytest.raises(DamagedData, match="holds 12 bytes, its checkpoint expects 13"):
        JsonLines(path, keep_bytes=13)
    assert rows(path) == [{"step": 0}]
    with pytest.raises(DamagedData, match="holds 0 bytes"):
        JsonLines(tmp_path / "missing.jsonl", keep_bytes=1)


def test_nan_is_refused_and_writes_nothing(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        log.write({"loss": float("nan")})
    assert log.num_bytes == 0
    log.close()


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    class FullFile:
        def write(self, data):
            raise OSError(errno.ENOSPC, "full")

    log = JsonLines(tmp_path / "log.jsonl")
    log.close()
    monkeypatch.setattr(log, "_file", FullFile())
    with pytest.raises(StorageError, match="disk is full"):
        log.write({"step": 0})
