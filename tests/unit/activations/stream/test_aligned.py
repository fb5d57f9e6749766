"""Rows of two sites belong together or are refused: shards compare them as they are read, servers say it for all rows at once."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from served_rows import D_IN, Start

from everyscope.activations.serve.config import ServeConfig
from everyscope.activations.serve.live import LiveOrigin
from everyscope.activations.shards.manifest import seal_folder, shard_path
from everyscope.activations.shards.reader import Shards
from everyscope.activations.shards.writer import new_activation_shard
from everyscope.activations.stream.aligned import Aligned
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.base.errors import DataError

ROWS = 700
READS, WRITES, SWAPPED, SHIFTED = "mlp_in/layer_1", "mlp_out/layer_1", "mlp_out/layer_2", "mlp_out/layer_3"


def write(folder: Path, site: str, sequence: np.ndarray, position: np.ndarray, sizes: tuple[int, ...]) -> None:
    start, rows = 0, torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(len(sizes)))
    for index, size in enumerate(sizes):
        part = slice(start, start + size)
        with new_activation_shard(shard_path(folder, index), site, size, D_IN, "float32", 16, {}) as writer:
            writer.put(rows[part], np.arange(size), sequence[part], position[part])
        start += size
    seal_folder(folder, len(sizes), site=site, config={}, parents={}, version="0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of the same tokens, in shards of other sizes; one with two rows in each other's place; one of other blocks."""
    root = tmp_path_factory.mktemp("aligned")
    sequence, position = np.arange(ROWS) // 16, np.arange(ROWS) % 16
    swapped = np.arange(ROWS)
    swapped[[5, 16 + 5]] = [16 + 5, 5]  # of equal positions in other blocks: no count shows it
    write(root / READS, READS, sequence, position, (400, 300))
    write(root / WRITES, WRITES, sequence, position, (100, 600))
    write(root / SWAPPED, SWAPPED, sequence[swapped], position[swapped], (400, 300))
    write(root / SHIFTED, SHIFTED, sequence + 1, position, (400, 300))
    return root


@pytest.fixture
def start(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    with ExitStack() as stack:
        yield Start(shards, stack)


@pytest.mark.parametrize("rows_at_once", [1, 130, 1 << 20])
def test_the_id_is_of_blocks_and_positions_alone(shards, monkeypatch, rows_at_once):
    whole = Shards(shards / READS).places_identity()
    assert whole != Shards(shards / SWAPPED).places_identity() != Shards(shards / SHIFTED).places_identity()
    monkeypatch.setattr("everyscope.activations.shards.reader.PLACES_AT_ONCE", rows_at_once)
    first, other = (Shards(shards / site).places_identity() for site in (READS, WRITES))
    assert first == other, "whatever shards they lie in"


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("use_files", [False, True])
def test_served_rows_of_the_same_tokens_are_taken_and_others_refused(start, shards, slices, use_files):
    url = start.url(READS, slices)
    with ExitStack() as stack:

        def served(site: str, base: str = url) -> FlightSource:
            return stack.enter_context(FlightSource(base.replace(READS, site), use_files=use_files))

        reads = served(READS)
        both = Aligned(reads, served(WRITES))
        for got, source in zip(both.rows(3, 50), both.sources, strict=True):
            assert torch.equal(got, source.batch(3, 50))
        for site in (SWAPPED, SHIFTED):
            with pytest.raises(DataError, match="rows of other tokens, or in another order"):
                Aligned(reads, served(site))
        with pytest.raises(DataError, match="in another order"):  # the same tokens, by chunks of another size
            Aligned(reads, served(WRITES, start.url(READS, 2, chunk_rows=64)))
        if slices == 1:
            Aligned(reads, LocalSource(shards / WRITES))
            with pytest.raises(DataError, match="rows of other tokens"):
                Aligned(LocalSource(shards / SWAPPED), reads)


def test_damaged_places_end_the_client_and_are_read_again_for_the_next(start, shards, tmp_path):
    root = tmp_path / "damaged"
    write(root / READS, READS, np.arange(ROWS) // 16, np.arange(ROWS) % 16, (ROWS,))
    path = shard_path(root / READS, 0)
    good = path.read_bytes()
    raw = bytearray(good)
    raw[5000] ^= 1  # within `sequence`
    port = start(shards=root).port  # described from the manifest, before anybody reads
    path.write_bytes(raw)
    with FlightSource(f"flight://127.0.0.1:{port}/{READS}", use_files=False) as source, pytest.raises(DataError):
        source.places_identity()
    path.write_bytes(good)
    with FlightSource(f"flight://127.0.0.1:{port}/{READS}", use_files=False) as source:
        assert source.places_identity() == Shards(root / READS).places_identity()


def test_a_model_gives_rows_of_the_same_tokens_at_every_site():
    sites = dict.fromkeys((READS, WRITES), 4)
    buckets: Any = SimpleNamespace(identity="a run", dtype="float32", borders=[0, 200, 400], widths=sites, statistics=sites)
    config = ServeConfig(shards=Path("none"), chunk_rows=50, buffer_bytes=10**9)
    origin = LiveOrigin(buckets, config)
    assert origin.places(READS) == origin.places(WRITES)
