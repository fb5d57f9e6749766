"""One word opens any source: a folder, an address, servers in fixed or in any order."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from served_rows import NUM_ROWS, Start, row_ids, write_sites

from everyscope.activations.stream.addresses import opened
from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.base.errors import ConfigError, DataError

SITE = "mlp_out/layer_1"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("served") / "shards")


@pytest.fixture
def start(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    with ExitStack() as stack:
        yield Start(shards, stack)


@pytest.mark.parametrize("place", ["folder", "file://", "server"])
def test_all_places_of_one_site_give_the_same_bits(start, shards, place):
    named = {
        "folder": str(shards / SITE),
        "file://": (shards / SITE).as_uri(),
        "server": start.url(SITE, offer_files=False),
    }
    plain = LocalSource(shards / SITE)
    with opened(named[place]) as source:
        assert isinstance(source, FlightSource) == (place == "server")
        assert (source.identity, source.statistics.scale, source.num_rows) == (plain.identity, plain.statistics.scale, NUM_ROWS)
        for step in (0, 1, 7, 40):
            assert torch.equal(source.batch(step, 77), plain.batch(step, 77))


def test_a_journal_means_any_order(start, tmp_path):
    url, journal = start.url(SITE, offer_files=False), tmp_path / "journal"
    with opened(url, journal=journal, trainer="t") as source:
        rows = [source.batch(step, 50) for step in range(-(-NUM_ROWS // 50))]
    assert Counter(row_ids(torch.cat(rows)[:NUM_ROWS])) == Counter(range(NUM_ROWS))
    with opened(url, journal=journal, trainer="t") as again:
        assert torch.equal(again.batch(3, 50), rows[3])


def test_the_source_is_closed_with_its_block(start, tmp_path):
    server = start(offer_files=False)
    url, journal = f"flight://127.0.0.1:{server.port}/{SITE}", tmp_path / "journal"
    with opened(url, journal=journal, trainer="t") as source:
        source.batch(0, 10)
        assert server.buffer.report()["buffer"]["leases"] == 1
        second = opened(url, journal=journal, trainer="u")
        with pytest.raises(ConfigError, match="another trainer writes this journal"):
            second.__enter__()
    assert server.buffer.report()["buffer"]["leases"] == 0


@pytest.mark.parametrize("place", ["/nowhere/at/all", "flight://127.0.0.1", "flight+tls://127.0.0.1:x/y"])
def test_what_is_no_place_is_one_error(place):
    with pytest.raises((ConfigError, DataError)) as caught, opened(place):
        pass
    assert len(str(caught.value).splitlines()) == 1
