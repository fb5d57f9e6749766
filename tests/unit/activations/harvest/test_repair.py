import json

import pytest

from everyscope.activations.harvest.folder import HarvestFolder
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import ConfigError, DamagedData, StorageError
from everyscope.sites.names import Site
from tests.unit.activations.harvest.conftest import activations_of, tree


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("ending", [".safetensors", ".json"])
def test_only_the_damaged_shard_is_written_anew(config, reap, model, ending):
    reap(config)
    before = tree(config.out)
    flip((config.out / "resid_post/layer_0/shard_00001").with_suffix(ending))
    with pytest.raises(DamagedData, match=r"shard_00001.*--repair"):
        verify_shards(config.out)
    reap(config)  # nothing is read, so nothing is found
    assert model.loads == 1
    asked = set()

    def watching(sites, input_ids):
        asked.update(sites)
        return model.activations(sites, input_ids)

    model.capture = watching
    reap(config, repair=True)
    assert asked == {Site("resid_post", 0)}
    assert model.loads == 2
    assert tree(config.out) == before


@pytest.mark.parametrize("victim", ["manifest.json", "statistics.json"])
def test_records_are_mended_without_a_model(config, reap, model, victim):
    reap(config)
    before = tree(config.out)
    flip(config.out / "attn_out/layer_0" / victim)
    reap(config, repair=True)
    assert tree(config.out) == before
    assert model.loads == 1


def test_tokens_are_mended_without_a_model(config, reap, model):
    reap(config)
    before = tree(config.out)
    flip(config.out / "tokens/shard_00000.safetensors")
    reap(config, repair=True)
    assert tree(config.out) == before
    assert model.loads == 1


def test_a_whole_folder_is_left_as_it_is(config, reap, model, capsys):
    first = reap(config)
    stamps = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()}
    assert reap(config, repair=True) == first
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.is_file()} == stamps
    assert "every shard is what was written" in capsys.readouterr().err


def test_an_unsealed_folder_and_a_grown_one_are_healed(config, reap):
    reap(config, num_tokens=1300)
    reap(config)
    before = tree(config.out)
    flip(config.out / "resid_post/layer_0/shard_00002.safetensors")
    reap(config, repair=True)
    assert tree(config.out) == before
    for folder in ("resid_post/layer_0", "tokens"):
        (config.out / folder / "manifest.json").unlink()
    flip(config.out / "resid_post/layer_0/shard_00003.safetensors")
    flip(config.out / "tokens/shard_00001.safetensors")
    reap(config, repair=True)
    assert tree(config.out) == before


def test_other_bytes_than_before_are_told(config, reap, model, capsys):
    reap(config)
    identity = json.loads((config.out / "resid_post/layer_0/manifest.json").read_text())["identity"]
    (config.out / "resid_post/layer_0/shard_00001.safetensors").unlink()
    model.capture = lambda sites, input_ids: {site: activations_of(site, input_ids) + 1 for site in sites}
    reap(config)
    assert "resid_post/layer_0 differs from before" in " ".join(capsys.readouterr().err.split())
    assert json.loads((config.out / "resid_post/layer_0/manifest.json").read_text())["identity"] != identity
    verify_shards(config.out)


def test_a_stranger_heals_nothing(config, reap):
    reap(config)
    flip(config.out / "resid_post/layer_0/shard_00001.safetensors")
    before = tree(config.out)
    with pytest.raises(ConfigError, match="seed is 0 there"):
        reap(config, repair=True, seed=1)
    assert tree(config.out) == before


def test_nobody_heals_what_others_are_writing(config, reap):
    with (
        HarvestFolder(config.model_copy(update={"partition": (0, 2)}), {"model": "stand-in"}).locked(),
        pytest.raises(StorageError, match="wait for it before you repair"),
    ):
        reap(config, repair=True, partition=(1, 2))
