import json

import pytest
import torch

from everyscope.activations.shards.manifest import MANIFEST, parse_manifest, read_manifest, seal_folder
from everyscope.activations.shards.reader import Shards
from everyscope.base.errors import DamagedData, DataError
from everyscope.base.ids import content_id
from tests.unit.activations.shards.conftest import SEALED, SIZES, write_site


def test_a_manifest_names_itself(written):
    value = json.loads((written.folder / MANIFEST).read_text())
    identity = value.pop("identity")
    assert identity == content_id(value) == read_manifest(written.folder).identity == Shards(written.folder).identity


def test_a_manifest_without_its_identity_is_refused(written):
    path = written.folder / MANIFEST
    value = json.loads(path.read_text())
    del value["identity"]
    path.write_text(json.dumps(value, indent=2) + "\n")
    with pytest.raises(DamagedData, match="differs from its own checksum"):
        Shards(written.folder)


@pytest.mark.parametrize("value", [None, 5, [], {}, "manifest", {"identity": 5}])
def test_what_is_no_manifest_is_refused(value):
    with pytest.raises(DataError, match="here: "):
        parse_manifest(json.dumps(value).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b'{"identity": NaN}', b"9" * 5000])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(DataError, match="here: "):
        parse_manifest(data, "here")


@pytest.mark.parametrize("site", ["resid_post/layer_3", "vision", "vision/block_7", "protein.esm-2/33"])
def test_a_site_may_be_called_anything_that_is_a_name(tmp_path, site):
    folder = write_site(tmp_path, "float32").folder
    seal_folder(folder, len(SIZES), site=site, **SEALED)
    assert Shards(folder).site == site


@pytest.mark.parametrize("site", ["", "../x", "a//b", "/etc", "a/../b", "x" * 201, "a b", "ünicode", "a\n"])
def test_a_site_is_no_path_to_elsewhere(written, site):
    value = json.loads((written.folder / MANIFEST).read_text()) | {"site": site}
    del value["identity"]
    with pytest.raises(DataError, match="site"):
        parse_manifest(json.dumps(value).encode(), "here")


def test_a_manifest_that_miscounts_is_refused(written):
    value = json.loads((written.folder / MANIFEST).read_text())
    value["num_rows"] += 1
    del value["identity"]
    value["identity"] = content_id(value)
    with pytest.raises(DamagedData, match="is not the sum"):
        parse_manifest(json.dumps(value).encode(), "here")


def test_who_has_opened_a_folder_reads_on_while_it_grows(tmp_path):
    made = write_site(tmp_path, "float32")
    opened, statistics = Shards(made.folder), Shards(made.folder).statistics.record().as_json()
    manifest = (made.folder / MANIFEST).read_bytes()
    grown = write_site(tmp_path / "more", "float32", sizes=(*SIZES, 50))
    for name in ("shard_00003.safetensors", "shard_00003.json", "statistics.json"):
        (made.folder / name).write_bytes((grown.folder / name).read_bytes())
    # Between the new statistics and the new manifest: whoever comes now finds the old folder, with its own figures.
    late = Shards(made.folder)
    assert late.statistics.record().as_json() == statistics == opened.statistics.record().as_json()
    assert late.identity == opened.identity
    (made.folder / MANIFEST).write_bytes((grown.folder / MANIFEST).read_bytes())
    assert torch.equal(opened.rows(0, opened.num_rows), made.rows)
    assert opened.statistics.record().as_json() == statistics
    assert torch.equal(Shards(made.folder).rows(0, 154), grown.rows)
    assert manifest != (made.folder / MANIFEST).read_bytes()
