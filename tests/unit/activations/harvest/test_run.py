import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from everyscope.activations.harvest.buckets import HarvestPosition, read_buckets
from everyscope.activations.harvest.folder import HarvestFolder
from everyscope.activations.harvest.timings import PARTS
from everyscope.activations.shards.reader import Shards, TokenBlocks
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import ConfigError, EveryscopeError, ModelError, NonFinite, StorageError, TextError
from everyscope.base.ids import content_id
from everyscope.sites.names import Site
from everyscope.text.blocks import read_blocks
from tests.unit.activations.harvest.conftest import WIDTHS, activations_of, tree


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_masked_position_of_the_train_split_once(config, reap, tokenizer, dtype):
    result = reap(config, dtype=dtype)
    blocks = list(read_blocks(config.text, tokenizer, "train"))
    want = {(number, int(position)) for number, block in enumerate(blocks) for position in np.flatnonzero(block.mask)}
    assert len(want) > 2 * config.bucket_rows
    for site, folder in result.folders.items():
        shards = Shards(folder)
        assert (shards.site, shards.dtype, shards.num_rows) == (site.folder, dtype, len(want))
        sequence, position = shards.sequence(0, shards.num_rows).long(), shards.position(0, shards.num_rows).long()
        pairs = list(zip(sequence.tolist(), position.tolist(), strict=True))
        assert set(pairs) == want
        assert len(pairs) == len(want) == result.num_rows
        activations = activations_of(site, torch.from_numpy(np.stack([block.input_ids for block in blocks])))
        assert torch.equal(shards.rows(0, shards.num_rows).float(), activations[sequence, position])
    tokens = TokenBlocks(result.tokens)
    assert torch.equal(tokens.input_ids(0, tokens.num_blocks), torch.from_numpy(np.stack([block.input_ids for block in blocks])))
    assert result.tokens_seen == len(blocks) * config.text.context
    verify_shards(config.out)


def test_rows_are_shuffled_within_buckets_alike_for_all_sites(config, reap):
    opened = [Shards(folder) for folder in reap(config).folders.values()]
    orders = [torch.stack([shards.sequence(0, shards.num_rows), shards.position(0, shards.num_rows)]) for shards in opened]
    assert all(torch.equal(order, orders[0]) for order in orders)
    first = opened[0].manifest.shards[0].rows
    sequence = orders[0][0, :first].double()
    assert sequence.max() < orders[0][0, first:].min() + 1
    assert abs(torch.corrcoef(torch.stack([torch.arange(first), sequence]))[0, 1]) < 0.2  # 4.5 standard errors of 0
    other = Shards(reap(config, seed=1, out=config.out.parent / "other").folders[Site("attn_out", 0)])
    assert not torch.equal(other.sequence(0, first), orders[0][0, :first])


@pytest.mark.parametrize("num_tokens", [1, 499, 500, 501, 777, 1000])
def test_num_tokens_is_kept_to_the_row(config, reap, num_tokens, capsys):
    result = reap(config, num_tokens=num_tokens)
    whole = reap(config, out=config.out.parent / "whole")
    assert "text ends" in capsys.readouterr().err
    for site, folder in result.folders.items():
        shards, all_shards = Shards(folder), Shards(whole.folders[site])
        assert shards.num_rows == result.num_rows == shards.statistics.count == num_tokens
        keep = [
            sorted(zip(s.sequence(0, s.num_rows).tolist(), s.position(0, s.num_rows).tolist(), strict=True))
            for s in (shards, all_shards)
        ]
        assert keep[0] == keep[1][:num_tokens]


def test_a_bucket_read_from_its_place_is_the_same(config, tokenizer):
    buckets = list(read_buckets(config, tokenizer, HarvestPosition()))
    assert len(buckets) > 2
    for bucket in buckets:
        again = next(read_buckets(config, tokenizer, HarvestPosition.of_json(bucket.before.as_json())))
        assert np.array_equal(again.input_ids, bucket.input_ids)
        assert np.array_equal(again.mask, bucket.mask)
        assert again.after == bucket.after
    assert not list(read_buckets(config, tokenizer, buckets[-1].after))


def test_a_finished_harvest_does_nothing(config, reap, model):
    first = reap(config)
    before, stamps = tree(config.out), {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    assert reap(config) == first
    assert model.loads == 1
    assert tree(config.out) == before
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == stamps


def test_fields_that_came_later_are_at_their_defaults_in_older_folders(config, reap, model):
    reap(config)
    for path in (config.out / "harvest.json", *config.out.rglob("manifest.json")):
        value = json.loads(path.read_text())
        value.pop("identity", None)
        del value["config"]["seed"], value["config"]["text"]["column"]
        seal = {} if path.name == "harvest.json" else {"identity": content_id(value)}
        path.write_text(json.dumps(seal | value))
    before = tree(config.out)
    reap(config)
    assert model.loads == 1
    assert tree(config.out) == before
    with pytest.raises(ConfigError, match="seed is 0 there and 3 here"):
        reap(config, seed=3)
    (config.out / "attn_out/layer_0/manifest.json").unlink()
    reap(config)  # only what is missing is sealed anew
    assert {name for name, data in tree(config.out).items() if before[name] != data} <= {
        "harvest.json",
        "attn_out/layer_0/manifest.json",
    }


def test_a_moved_folder_is_still_finished(config, reap, model):
    reap(config)
    moved = config.out.rename(config.out.parent / "moved")
    reap(config, out=moved)
    assert model.loads == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there"),
        ({"num_tokens": 5}, "num_tokens is 1000000 there and 5 here"),
        ({"sites": (Site("attn_out", 0),)}, "sites is"),
        ({"identity": "retrained"}, "parents.model is 'stand-in' there and 'retrained' here"),
    ],
)
def test_another_config_in_the_folder_is_refused_by_field(config, reap, model, changes, field):
    reap(config)
    before = tree(config.out)
    with pytest.raises(ConfigError, match=field):
        reap(config, **changes)
    nested = config.model_copy(update={"text": config.text.model_copy(update={"context": 64})})
    with pytest.raises(ConfigError, match=r"text\.context is 32 there and 64 here"):
        reap(nested)
    assert model.loads == 1
    assert tree(config.out) == before


@pytest.mark.parametrize(
    "victim", ["resid_post/layer_0/shard_00001.safetensors", "tokens/shard_00001.safetensors", "tokens/manifest.json"]
)
@pytest.mark.parametrize("num_tokens", [1200, 10**6])
def test_whatever_is_deleted_comes_back_as_it_was(config, reap, victim, num_tokens):
    config = config.model_copy(update={"num_tokens": num_tokens})
    reap(config)
    before = tree(config.out)
    (config.out / victim).unlink()
    reap(config)
    assert tree(config.out) == before


def test_a_lost_manifest_costs_no_model(config, reap, model):
    reap(config)
    before = tree(config.out)
    for name in ("manifest.json", "statistics.json"):
        (config.out / "attn_out/layer_0" / name).unlink()
        reap(config)
    assert tree(config.out) == before
    assert model.loads == 1


@pytest.mark.parametrize("shuffle_bytes", [1, 3000, 20_000])
def test_the_memory_for_shuffling_changes_no_byte(config, reap, shuffle_bytes):
    reap(config)
    reap(config, shuffle_bytes=shuffle_bytes, out=config.out.parent / "little")
    assert tree(config.out.parent / "little") == tree(config.out)


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_a_clock_that_jumps_changes_nothing(config, reap, model, jump, monkeypatch):
    reap(config)
    before = tree(config.out)
    for number, path in enumerate(sorted(config.out.rglob("*"))):
        os.utime(path, (0, path.stat().st_mtime + jump * (-1) ** number))
    reap(config)
    assert model.loads == 1
    (config.out / "attn_out/layer_0/shard_00001.safetensors").unlink()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    reap(config)
    assert tree(config.out) == before


def test_it_says_where_the_time_went(config, reap, capsys):
    result = reap(config)
    assert set(result.seconds) == set(PARTS)
    assert all(seconds >= 0 for seconds in result.seconds.values())
    assert min(result.seconds[part] for part in ("text", "forward", "commit", "write")) > 0
    assert "harvest took" in capsys.readouterr().err
    assert not reap(config).seconds


def test_only_missing_sites_are_captured_again(config, reap, model):
    reap(config)
    before = tree(config.out)
    (config.out / "resid_post/layer_1/shard_00000.safetensors").unlink()
    asked = set()

    def watching(sites, input_ids):
        asked.update(sites)
        return model.activations(sites, input_ids)

    model.capture = watching
    reap(config)
    assert asked == {Site("resid_post", 1)}
    assert tree(config.out) == before


def test_a_disk_without_room_is_refused_before_the_model_is_loaded(config, reap, model, monkeypatch, capsys):
    full = shutil.disk_usage(config.out.parent)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match=r"needs .* only 976\.6 KiB are free"):
        reap(config)
    assert "need at most" in capsys.readouterr().err
    assert model.loads == 0
    assert not config.out.exists()
    reap(config, num_tokens=1500)


def test_a_disk_that_fills_up_on_the_way_keeps_whole_shards_only(config, reap, monkeypatch):
    reserve = os.posix_fallocate

    def filling(file, *args):
        if "shard_00001" in str(Path(f"/proc/self/fd/{file}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(file, *args)

    monkeypatch.setattr(os, "posix_fallocate", filling)
    with pytest.raises(StorageError, match=r"shard_00001.*the disk is full"):
        reap(config)
    assert sorted(path.name for path in config.out.rglob("*") if path.is_file() and path.name != "harvest.json") == sorted(
        ["shard_00000.json", "shard_00000.safetensors"] * (len(WIDTHS) + 1)
    )
    monkeypatch.undo()
    reap(config)
    verify_shards(config.out)


def test_a_limit_on_files_is_one_clear_error_and_keeps_whole_shards_only(config, reap):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, hard))  # the first shards that are larger are those of attn_out
    try:
        with pytest.raises(StorageError, match=r"attn_out/layer_0/shard_00000\.safetensors: file size limit exceeded"):
            reap(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not config.out.exists()
    reap(config)
    verify_shards(config.out)


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("calls", [0, 3, 9])
def test_a_disk_that_fails_at_any_call_loses_nothing_whole(config, reap, monkeypatch, name, code, calls):
    true, left = getattr(os, name), iter(range(calls))

    def failing(*args, **kwargs):
        if next(left, None) is None:
            raise OSError(code, os.strerror(code))
        return true(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    with pytest.raises(StorageError):
        reap(config)
    monkeypatch.undo()
    if config.out.exists():
        assert not [path for path in config.out.rglob("*") if path.suffix in (".partial", ".lock")]
    reap(config)
    reap(config, out=config.out.parent / "undisturbed")
    assert tree(config.out) == tree(config.out.parent / "undisturbed")


def test_disk_need_is_an_upper_bound_and_shrinks_by_what_is_there(config, reap):
    for num_tokens in (1, 500, 1400):
        config = config.model_copy(update={"num_tokens": num_tokens, "out": config.out.parent / str(num_tokens)})
        folder = HarvestFolder(config, {})
        need = folder.num_bytes(WIDTHS)
        reap(config)
        written = sum(path.stat().st_size for path in config.out.rglob("*.safetensors"))
        assert written <= need
        assert folder.num_bytes(WIDTHS) == need - written


def test_a_folder_that_cannot_be_written_is_named(config, reap, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(StorageError, match="file"):
            reap(config, out=out)
    assert model.loads == 0
    assert (tmp_path / "file").read_text() == "in the way"


def test_two_harvests_do_not_share_a_folder(config, reap):
    with HarvestFolder(config, {}).locked(), pytest.raises(StorageError, match="another harvest is writing here"):
        reap(config)
    reap(config)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("exists", [True, False])
def test_activations_that_are_not_finite_are_named_and_leave_nothing(config, reap, model, bad, exists):
    def broken(sites, input_ids):
        found = model.activations(sites, input_ids)
        found[Site("resid_post", 1)][1, 5, 2] = bad
        return found

    if exists:
        config.out.mkdir()
    model.capture = broken
    with pytest.raises(NonFinite, match="resid_post layer 1, block 1, position 5"):
        reap(config)
    assert config.out.exists() == exists
    assert not tree(config.out)
    model.capture = model.activations
    reap(config, seed=5)


def test_an_error_later_on_keeps_whole_shards_only(config, reap, model):
    def broken(sites, input_ids):
        if model.passes == 10:
            raise ModelError("out of luck")
        return model.activations(sites, input_ids)

    model.capture = broken
    with pytest.raises(ModelError):
        reap(config)
    left = tree(config.out)
    assert "tokens/shard_00000.json" in left
    assert not [name for name in left if name.endswith(".partial") or name == "manifest.json"]
    assert {name.removesuffix(".json") + ".safetensors" for name in left if name.endswith("0.json")} <= set(left)
    model.capture = model.activations
    reap(config)
    reap(config, out=config.out.parent / "undisturbed")
    assert tree(config.out) == tree(config.out.parent / "undisturbed")


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_text_leaves_nothing(config, reap, model, corpus, text):
    for path in corpus.iterdir():
        path.write_text(text)
    with pytest.raises(TextError):
        reap(config)
    assert model.loads == 0
    assert not config.out.exists()


def test_text_of_which_nothing_counts_leaves_nothing(config, reap, model, corpus, tokenizer):
    for number, path in enumerate(sorted(corpus.iterdir())):
        path.write_text(tokenizer.eos_token * (1 + number))
    with pytest.raises(EveryscopeError, match="no countable token"):
        reap(config)
    assert model.loads == 0
    assert not config.out.exists()
