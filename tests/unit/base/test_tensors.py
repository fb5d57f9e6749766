"""Tensors written by us are read by the public package, and a write cut off at any point leaves one known name behind."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from everyscope.base.errors import DamagedData, DataError
from everyscope.base.tensors import opened_tensors, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TENSORS = {
    "weights": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    "sums": torch.tensor([1.5, -2.25], dtype=torch.float64),
    "count": torch.tensor(2**40),
    "places": torch.tensor([[1], [-1]], dtype=torch.int32),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "empty": torch.zeros(0, 5),
}


def test_the_public_package_reads_what_we_wrote(tmp_path):
    path = tmp_path / "deep/x.safetensors"
    write_tensors(path, TENSORS, {"place": "7", "who": "us"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "place": "7", "who": "us"}
    assert names(path.parent) == [path.name]


def test_equal_tensors_give_equal_bytes_in_any_order_of_the_mapping(tmp_path):
    write_tensors(tmp_path / "a", TENSORS)
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_write_that_never_ends_leaves_only_its_partial_file(tmp_path, monkeypatch):
    seen: list[list[str]] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(names(tmp_path)), sync(descriptor)))
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    write_tensors(path, TENSORS)
    assert seen == [["x.safetensors.partial"], ["x.safetensors", "x.safetensors.partial"]]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path: Path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(KeyError, match="complex64"):
        write_tensors(path, {"odd": torch.zeros(2, dtype=torch.complex64)})
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


def test_a_sealed_file_is_read_by_the_public_package_and_by_us(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"place": "7"}, is_sealed=True)
    assert torch.equal(load_file(path)["sums"], TENSORS["sums"])
    with opened_tensors(path) as file:
        assert file.metadata()["place"] == "7"
        assert torch.equal(file.get_tensor("weights"), TENSORS["weights"])


def test_no_bit_of_a_sealed_file_changes_unseen(tmp_path):
    """Each byte once, by a bit that moves along: header, metadata, the checksum itself, padding and data."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"place": "7"}, is_sealed=True)
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.safetensors.*run the same command again"), opened_tensors(path):
            pass
    for length in (0, 7, 8, 100, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(DamagedData, match=r"x\.safetensors"), opened_tensors(path):
            pass


def test_what_a_sealed_file_lacks_is_said_with_its_name(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, is_sealed=True)
    with pytest.raises(DamagedData, match=r"x\.safetensors.*other"), opened_tensors(tmp_path / "x.safetensors") as file:
        file.get_tensor("other")
    write_tensors(tmp_path / "open.safetensors", TENSORS)
    with pytest.raises(DamagedData, match="expected None"), opened_tensors(tmp_path / "open.safetensors"):
        pass
