"""FlightSource against real servers in this process."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from served_rows import CHUNK_ROWS, D_IN, NUM_ROWS, SITES, Start, row_ids, write_site, write_sites

from everyscope.activations.stream.flight import FlightSource
from everyscope.activations.stream.local import LocalSource
from everyscope.activations.stream.servers import parse_url
from everyscope.activations.stream.sliced import SlicedSource
from everyscope.activations.stream.source import Source
from everyscope.base.errors import ConfigError, DamagedData, DataError, StorageError

SITE = "resid_post/layer_0"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sites(tmp_path_factory.mktemp("served") / "shards")


@pytest.fixture
def start(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.delenv("EVERYSCOPE_TOKEN", raising=False)
    with ExitStack() as stack:
        yield Start(shards, stack)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("use_files", [False, True])
def test_one_server_gives_the_bits_of_a_local_source(start, shards, site, use_files):
    local = LocalSource(shards / site)
    with FlightSource(start.url(site), use_files=use_files) as remote:
        source: Source = remote
        assert remote.reads_files == use_files
        assert (source.d_in, source.num_rows, source.statistics.scale) == (D_IN, NUM_ROWS, local.statistics.scale)
        assert source.identity == local.identity
        for step in range(2 * NUM_ROWS // 64 + 2):
            assert torch.equal(source.batch(step, 64), local.batch(step, 64))
        for step, rows in ((0, 1), (3, 500), (1, 2500), (0, 100), (7, 33)):
            assert torch.equal(source.batch(step, rows), local.batch(step, rows))


@pytest.mark.parametrize("slices", [2, 3, 11])
@pytest.mark.parametrize("rows", [64, 250])
def test_several_servers_give_the_bits_of_a_sliced_source(start, shards, slices, rows):
    local = SlicedSource(shards / SITE, CHUNK_ROWS, slices)
    with FlightSource(start.url(slices=slices), use_files=False) as source:
        assert source.identity == local.identity != LocalSource(shards / SITE).identity
        epoch = torch.cat([source.batch(step, rows) for step in range(-(-2 * NUM_ROWS // rows))])
        assert torch.equal(epoch, torch.cat([local.batch(step, rows) for step in range(-(-2 * NUM_ROWS // rows))]))
        assert Counter(row_ids(epoch[:NUM_ROWS])) == Counter(range(NUM_ROWS))


def test_one_slice_is_the_order_of_a_local_source(shards):
    local, sliced = LocalSource(shards / SITE), SlicedSource(shards / SITE, 64, 1)
    assert local.identity == sliced.identity
    for step in range(20):
        assert torch.equal(local.batch(step, 77), sliced.batch(step, 77))


@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("use_files", [False, True])
def test_any_order_gives_each_row_once_an_epoch_and_replays_by_its_journal(start, tmp_path, slices, use_files):
    url, journal, rows = start.url(slices=slices), tmp_path / "journal", 70
    steps = -(-2 * NUM_ROWS // rows)
    batches: list[torch.Tensor] = []
    for life in range(3):  # closed and opened again in the middle, with chunks on their way
        with FlightSource(url, order="any", journal=journal, use_files=use_files) as source:
            identity = source.identity
            while len(batches) < (life + 1) * steps // 3:
                batches.append(source.batch(len(batches), rows))
    everything = torch.cat(batches)
    for epoch in range(2):
        assert Counter(row_ids(everything[epoch * NUM_ROWS : (epoch + 1) * NUM_ROWS])) == Counter(range(NUM_ROWS))
    with FlightSource(url, order="any", journal=journal, use_files=use_files) as again:
        assert again.identity == identity
        for step in (0, 5, 5, len(batches) - 1, 3):
            assert torch.equal(again.batch(step, rows), batches[step])


def test_trainers_at_one_server_share_its_reads_and_each_gets_all_rows(start, tmp_path):
    server = start(buffer_bytes=1 << 20)
    url, errors = f"flight://127.0.0.1:{server.port}/{SITE}", []

    def train(number: int) -> None:
        try:
            order, journal = ("any", tmp_path / f"{number}") if number < 3 else ("fixed", None)
            with FlightSource(url, order=order, journal=journal, use_files=False, trainer=f"sweep/t.{number}") as source:
                rows = torch.cat([source.batch(step, 50) for step in range(NUM_ROWS // 50)] + [source.batch(NUM_ROWS // 50, 50)])
            assert Counter(row_ids(rows[:NUM_ROWS])) == Counter(range(NUM_ROWS))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    counts = server.buffer.report()["sites"][SITE]
    assert counts["amortisation"] > 5
    assert counts["chunks_read"] == -(-NUM_ROWS // CHUNK_ROWS)


def test_servers_that_do_not_belong_together_are_refused(start, shards, tmp_path):
    write_site(tmp_path / SITE, SITE, "float32", sizes=(400,))
    here, foreign = start(slice="0/2"), start(slice="1/2", shards=tmp_path)
    coarse, whole = start(slice="1/2", chunk_rows=50), start()
    for ports, message in (
        ((here.port, foreign.port), "has identity="),
        ((here.port, coarse.port), "chunk_rows=50"),
        ((here.port, whole.port), "slice_count=1"),
        ((here.port,), "slices \\[0\\] of 2"),
    ):
        url = f"flight://{','.join(f'127.0.0.1:{port}' for port in ports)}/{SITE}"
        with pytest.raises(DataError, match=message):
            FlightSource(url)
    with pytest.raises(DataError, match="no such site"):
        FlightSource(f"flight://127.0.0.1:{whole.port}/resid_post/layer_7")


def test_silence_of_a_server_is_one_error_after_the_deadline(start):
    with ExitStack() as alone:
        port = Start(start.shards, alone)().port
    with pytest.raises(StorageError, match=r"no answer for 0\.3 s"):
        FlightSource(f"flight://127.0.0.1:{port}/{SITE}", deadline=0.3)


@pytest.mark.parametrize("order", ["fixed", "any"])
def test_a_source_whose_server_ends_says_so_and_goes_on_with_its_successor(start, tmp_path, order):
    journal = tmp_path / "journal" if order == "any" else None
    with ExitStack() as first:
        port = Start(start.shards, first)().port
        url = f"flight://127.0.0.1:{port}/{SITE}"
        source = FlightSource(url, order=order, journal=journal, use_files=False, deadline=2, ahead=2)
        batches = [source.batch(0, 100)]
    with source:
        with pytest.raises(StorageError, match="start the server"):
            batches.extend(source.batch(step, 100) for step in range(1, 9))
        start(listen=f"127.0.0.1:{port}")
        while len(batches) < 10:
            batches.append(source.batch(len(batches), 100))
        batches.append(source.batch(10, 100))
    assert Counter(row_ids(torch.cat(batches)[:NUM_ROWS])) == Counter(range(NUM_ROWS))


def test_in_any_order_the_others_go_on_while_one_server_is_away(start, tmp_path):
    with ExitStack() as leaving:
        away = Start(start.shards, leaving)(slice="0/2")
        stays = start(slice="1/2")
        url = f"flight://127.0.0.1:{away.port},127.0.0.1:{stays.port}/{SITE}"
        source = FlightSource(url, order="any", journal=tmp_path / "journal", use_files=False, ahead=1, deadline=20)
    with source:
        batches = [source.batch(step, 100) for step in range(5)]
        assert all(row >= 500 for row in row_ids(torch.cat(batches)))
        start(slice="0/2", listen=f"127.0.0.1:{away.port}")
        batches += [source.batch(step, 100) for step in range(5, 11)]
    assert Counter(row_ids(torch.cat(batches)[:NUM_ROWS])) == Counter(range(NUM_ROWS))


def test_a_second_process_under_one_name_is_told_apart(start):
    url = start.url()
    with FlightSource(url, trainer="same", use_files=False, ahead=1) as first:
        first.batch(0, 10)
        with FlightSource(url, trainer="same", use_files=False, ahead=1) as second:
            second.batch(0, 10)
            with pytest.raises(ConfigError, match="another process trains under the name"):
                first.batch(5, 100)


def test_a_damaged_shard_is_named_to_the_trainer(start, shards, tmp_path):
    copy = tmp_path / SITE
    write_site(copy, SITE, "float32")
    shard = sorted(copy.glob("*.safetensors"))[1]
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with FlightSource(start.url(shards=tmp_path), use_files=False, ahead=1) as source:
        source.batch(0, 100)
        with pytest.raises(DamagedData, match=shard.name):
            source.batch(5, 100)


@pytest.mark.parametrize("refused_by", ["server", "client", "identity"])
def test_files_are_read_only_where_both_sides_agree_and_they_are_the_same(start, refused_by, monkeypatch, tmp_path):
    if refused_by == "identity":
        write_site(tmp_path / SITE, SITE, "float32", sizes=(77,))
        monkeypatch.setattr("everyscope.activations.stream.servers.Path", lambda folder: tmp_path / SITE)
    url = start.url(offer_files=refused_by != "server")
    with FlightSource(url, use_files=refused_by != "client") as source:
        assert not source.reads_files
        assert row_ids(source.batch(0, 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "url", ["http://a:1/x/layer_0", "flight://a:1", "flight://a:1/", "flight:///x", "flight://a/x", "flight://a:1,a:1/x", "a:1/x"]
)
def test_urls_that_name_no_server_are_refused(url):
    with pytest.raises(ConfigError, match="names"):
        parse_url(url)


@pytest.mark.parametrize("name", ["", "../x", "a b", "a//b", "x" * 129, "a\n", "/a"])
def test_trainers_have_plain_names(name):
    with pytest.raises(ConfigError, match="trainer="):
        FlightSource("flight://127.0.0.1:1/x", trainer=name)


def test_a_journal_belongs_to_any_order(tmp_path):
    with pytest.raises(ConfigError, match="needs a journal"):
        FlightSource("flight://127.0.0.1:1/x", order="any")
    with pytest.raises(ConfigError, match="needs a journal"):
        FlightSource("flight://127.0.0.1:1/x", journal=tmp_path / "journal")
