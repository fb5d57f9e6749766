import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from everyscope.activations.shards import remote, transports
from everyscope.activations.shards.cache import BlockCache
from everyscope.activations.shards.checksums import BLOCK_BYTES
from everyscope.activations.shards.manifest import shard_path
from everyscope.activations.shards.reader import Shards, TokenBlocks, open_shards, shard_folder
from everyscope.activations.shards.remote import RemoteFolder
from everyscope.activations.shards.transports import FsspecTransport, HttpTransport, Patience, transport_of
from everyscope.base.errors import ConfigError, DamagedData, DataError, MissingExtra, StorageError
from tests.unit.activations.shards.conftest import Written, write_site
from tests.unit.activations.shards.web import Web, failing, flipped, serving, shifted, truncated, without_ranges

LARGE = {"sizes": (3000, 2000), "d_in": 1024}
"""Two shards of several blocks of 4 MiB."""


class Clock:
    """A time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Written:
    return write_site(tmp_path_factory.mktemp("large") / "resid_post/layer_3", "bfloat16", **LARGE)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EVERYSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def web(large) -> Iterator[Web]:
    with serving(large.folder.parents[1]) as web:
        yield web


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patient(web, clock, tmp_path):
    """Shards behind the server, read with patience that takes no time."""

    def opened(deadline: float = 60.0, attempt: float = 5.0) -> Shards:
        patience = Patience(deadline=deadline, attempt=attempt, sleep=clock.sleep, clock=lambda: clock.now)
        address = f"{web.address}/resid_post/layer_3"
        return Shards(RemoteFolder(address, HttpTransport(address), BlockCache(tmp_path / "cache"), patience))

    return opened


@pytest.fixture(params=["memory", "http"])
def address(request, large) -> Iterator[str]:
    """The same folder, elsewhere."""
    if request.param == "http":
        with serving(large.folder.parents[1]) as web:
            yield f"{web.address}/resid_post/layer_3/"
        return
    files = fsspec.filesystem("memory")
    for path in large.folder.iterdir():
        files.pipe_file(f"/bucket/site/{path.name}", path.read_bytes())
    yield "memory://bucket/site"
    files.rm("/bucket", recursive=True)


def test_an_address_reads_like_a_path(address, large):
    near, far = open_shards(large.folder), open_shards(address)
    assert (far.identity, far.num_rows, far.d_in, far.site) == (near.identity, near.num_rows, near.d_in, near.site)
    assert far.statistics.record().as_json() == near.statistics.record().as_json()
    for start, stop in ((0, 1), (10, 2500), (2990, 3010), (0, 5000), (4999, 5000), (7, 7)):
        assert torch.equal(far.rows(start, stop), large.rows[start:stop])
        assert torch.equal(far.position(start, stop), large.position[start:stop])
    rows = torch.empty(5000, 1024)
    far.prepare(0, 5000)
    far.rows_into(0, 5000, rows)
    assert torch.equal(rows, large.rows.float())


def test_only_the_blocks_that_are_needed_are_asked_for(web, patient):
    shards = patient()
    web.requests.clear()
    shards.rows(2100, 2101)  # bytes from 4 MiB on: the second block of the first shard
    assert web.requests == [
        ("/resid_post/layer_3/shard_00000.json", None),
        ("/resid_post/layer_3/shard_00000.safetensors", f"bytes={BLOCK_BYTES}-{shard_size(web) - 1}"),
    ]


def shard_size(web: Web) -> int:
    return shard_path(web.root / "resid_post/layer_3", 0).stat().st_size


def test_what_has_been_read_is_kept_on_disk_and_checked_again(web, patient, own_cache, large):
    assert torch.equal(patient().rows(0, 5000), large.rows)
    blocks = sorted(own_cache.glob("??/*"))
    assert len(blocks) == 3
    blocks[1].write_bytes(b"torn" + blocks[1].read_bytes()[4:])
    web.requests.clear()
    assert torch.equal(patient().rows(0, 5000), large.rows)
    assert len([path for path, _ in web.requests if path.endswith(".safetensors")]) == 1


def test_memory_holds_few_blocks(patient, large, monkeypatch):
    monkeypatch.setattr(remote, "MEMORY_BLOCKS", 2)
    shards = patient()
    for _ in range(2):
        shards.prepare(0, 5000)
        assert torch.equal(shards.rows(0, 5000), large.rows)
        assert len(shards._files.folder._blocks) <= 2


@pytest.mark.parametrize("replies", [[truncated], [failing(503), failing(500), truncated], [flipped], [failing(429)] * 7])
def test_what_may_mend_itself_is_asked_for_again(web, patient, clock, replies, large):
    shards = patient()
    web.misbehave(*replies)
    assert torch.equal(shards.rows(2500, 2600), large.rows[2500:2600])
    waits = [0.25 * 2**turn for turn in range(len(replies) - (flipped in replies))]
    assert clock.slept == pytest.approx([min(10, wait) for wait in waits], rel=0.2)


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (failing(404), DamagedData, "shard_00000.safetensors: the shard is missing"),
        (failing(403), StorageError, "shard_00000.safetensors: reading is not allowed"),
        (failing(416), DamagedData, "shard_00000.safetensors: ends before byte"),
        (failing(503), StorageError, "shard_00000.safetensors: no complete answer within 60 s, .*503"),
        (truncated, StorageError, "shard_00000.safetensors: no complete answer within 60 s"),
        (without_ranges, StorageError, "shard_00000.safetensors: the server does not support byte ranges"),
        (shifted, DamagedData, "shard_00000.safetensors: sent bytes"),
        (flipped, DamagedData, "shard_00000.safetensors: block 0 of 4 MiB differs"),
    ],
)
def test_what_does_not_mend_itself_is_one_clear_error(web, patient, clock, reply, error, message, own_cache):
    shards = patient()
    web.misbehave(*[reply] * 99)
    with pytest.raises(error, match=message):
        shards.rows(0, 10)
    assert clock.now <= 60
    assert not list(own_cache.glob("??/*"))
    web.misbehave()
    shards.rows(0, 10)


def test_a_server_that_does_not_answer_is_given_up_on(web, large):
    address = f"{web.address}/resid_post/layer_3"
    patience = Patience(deadline=0.3, attempt=0.1, pause=0.01)
    shards = Shards(RemoteFolder(address, HttpTransport(address), BlockCache(Path("/nowhere")), Patience()))
    shards._files.folder._patience = patience  # pyright: ignore[reportAttributeAccessIssue]
    released = []

    def silent(request, data, start, stop):
        while not released and not request.wfile.closed:
            request.connection.settimeout(0.05)
            try:
                if not request.connection.recv(1):
                    return
            except TimeoutError:
                continue

    web.misbehave(*[silent] * 99)
    try:
        with pytest.raises(StorageError, match=r"no complete answer within 0\.3 s.*timed out"):
            shards.rows(0, 10)
    finally:
        released.append(True)


def test_an_unfinished_folder_elsewhere_is_refused(web, patient, large, tmp_path):
    web.root = tmp_path
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        patient()
    copy = shutil.copytree(large.folder, tmp_path / "resid_post/layer_3")
    shards = patient()
    (copy / "shard_00001.json").write_text("{}")
    with pytest.raises(DamagedData, match=r"shard_00001\.json: differs from its checksum"):
        shards.rows(4000, 4001)
    (copy / "shard_00001.json").unlink()
    with pytest.raises(DamagedData, match=r"shard_00001\.json: the sidecar is missing"):
        shards.rows(4000, 4001)


def test_a_manifest_names_no_files_of_other_folders(tmp_path, web, patient, large):
    copy = shutil.copytree(large.folder, tmp_path / "resid_post/layer_3")
    web.root = tmp_path
    for name in ("../../secret.safetensors", "/etc/passwd", "shard_00000.safetensors/../x", "shard_1.safetensors"):
        value = json.loads((large.folder / "manifest.json").read_text())
        value["shards"][0]["file"] = name
        (copy / "manifest.json").write_text(json.dumps(value))
        with pytest.raises(DataError, match=r"shards\.0\.file"):
            patient()


def test_paths_and_addresses_are_told_apart(tmp_path, large):
    assert shard_folder(str(tmp_path)) == tmp_path == shard_folder(f"file://{tmp_path}") == shard_folder(tmp_path)
    assert open_shards(f"file://{large.folder}").identity == open_shards(str(large.folder)).identity
    with pytest.raises(ConfigError, match="nonsense"):
        open_shards("nonsense://bucket/site")
    with pytest.raises(DataError, match="no such file"):
        open_shards("memory://nothing/here")


def test_a_protocol_without_its_package_names_the_extra(monkeypatch):
    def missing(address):
        raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(MissingExtra, match=r"s3fs.*everyscope\[cloud\]"):
        open_shards("s3://bucket/site")


def test_tokens_are_read_from_afar_too(tokens, tmp_path):
    folder, blocks = tokens
    with serving(folder) as web:
        opened = TokenBlocks(shard_folder(web.address))
        assert torch.equal(opened.input_ids(1, 6), blocks[1:6])
        with pytest.raises(DataError, match="expected activations"):
            open_shards(web.address)


def test_file_systems_that_hang_are_given_up_on(monkeypatch):
    transport = transport_of("memory://bucket/site")
    assert isinstance(transport, FsspecTransport)
    release = transports.threading.Event()
    monkeypatch.setattr(transport._files, "cat_file", lambda *args, **kwargs: release.wait(), raising=False)
    with pytest.raises(TimeoutError):
        transport.read("shard_00000.safetensors", 0, 1, seconds=0.05)
    release.set()
