import json
import shutil

import pytest
import torch

from everyscope.activations.shards.manifest import read_manifest
from everyscope.activations.shards.reader import Shards, TokenBlocks
from everyscope.activations.shards.verify import verify_shards
from everyscope.base.errors import ConfigError, StorageError, TextError
from everyscope.sites.names import Site
from everyscope.text.config import TextConfig
from everyscope.text.identity import text_identity
from tests.unit.activations.harvest.conftest import activations_of, tree

FIRST, SITE = 1300, Site("resid_post", 1)


def rows_of(folder) -> list[tuple[int, int]]:
    shards = Shards(folder)
    return list(zip(shards.sequence(0, shards.num_rows).tolist(), shards.position(0, shards.num_rows).tolist(), strict=True))


def shard_bytes(folder) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if "/shard_" in name}


@pytest.mark.parametrize("more", [1301, 1400, 1900, 10**6])
def test_a_harvest_goes_on_from_the_end_and_leaves_old_shards_alone(config, reap, more):
    first = reap(config, num_tokens=FIRST)
    old, opened = shard_bytes(config.out), {site: Shards(folder) for site, folder in first.folders.items()}
    rows = {site: shards.rows(0, FIRST) for site, shards in opened.items()}
    grown = reap(config, num_tokens=more)
    assert grown.num_rows > FIRST
    assert old.items() <= shard_bytes(config.out).items()
    verify_shards(config.out)
    tokens = TokenBlocks(grown.tokens)
    activations = activations_of(SITE, tokens.input_ids(0, tokens.num_blocks).long())
    for site, folder in grown.folders.items():
        shards = Shards(folder)
        assert shards.num_rows == shards.statistics.count == grown.num_rows <= more
        assert torch.equal(shards.rows(0, FIRST), rows[site])
        assert torch.equal(opened[site].rows(0, FIRST), rows[site])  # who has opened the old manifest reads on
        parents = {"model": "stand-in", "text": text_identity(config.text), "earlier": opened[site].identity}
        assert shards.manifest.parents == parents
        assert shards.identity != opened[site].identity
    pairs = rows_of(grown.folders[SITE])
    assert len(set(pairs)) == len(pairs)
    sequence, position = map(torch.tensor, zip(*pairs, strict=True))
    assert torch.equal(Shards(grown.folders[SITE]).rows(0, len(pairs)), activations[sequence, position])


def test_what_is_left_out_at_the_seam_is_less_than_a_block(config, reap):
    reap(config, num_tokens=FIRST)
    grown, whole = reap(config), reap(config, out=config.out.parent / "whole")
    missing = set(rows_of(whole.folders[SITE])) - set(rows_of(grown.folders[SITE]))
    assert 0 < len(missing) < config.text.context
    assert len({sequence for sequence, _ in missing}) == 1


@pytest.mark.parametrize("partitions", [1, 2, 3])
def test_growing_twice_gives_the_same_bytes_however_it_is_done(config, reap, model, partitions):
    def steps(out, partitions):
        for num_tokens in (FIRST, FIRST + 60, 1900):
            results = [reap(config, num_tokens=num_tokens, out=out, partition=(n, partitions)) for n in range(partitions)]
        return results[-1]

    steps(config.out.parent / "one", 1)
    result = steps(config.out, partitions)
    assert tree(config.out) == tree(config.out.parent / "one")
    assert json.loads((config.out / "harvest.json").read_text())["stops"] == [FIRST, FIRST + 60]
    loads = model.loads
    assert reap(config, num_tokens=1900).num_rows == result.num_rows
    assert model.loads == loads


@pytest.mark.parametrize("victim", ["attn_out/layer_0/shard_00002.safetensors", "tokens/shard_00003.safetensors"])
def test_what_is_deleted_of_a_grown_folder_comes_back_as_it_was(config, reap, victim):
    for num_tokens in (FIRST, 1600):
        reap(config, num_tokens=num_tokens)
    before = tree(config.out)
    (config.out / victim).unlink()
    reap(config, num_tokens=1600)
    assert tree(config.out) == before


def test_growing_that_is_interrupted_goes_on(config, reap, model):
    for out in (config.out, config.out.parent / "undisturbed"):
        reap(config, num_tokens=FIRST, out=out)
    reap(config, num_tokens=1900, out=config.out.parent / "undisturbed")
    old = {site: Shards(config.out / site.folder) for site in config.sites}

    def broken(sites, input_ids):
        if model.passes % 11 == 10:
            model.passes += 1
            raise KeyboardInterrupt
        return model.activations(sites, input_ids)

    model.capture = broken
    for _ in range(9):
        try:
            reap(config, num_tokens=1900)
            break
        except KeyboardInterrupt:
            for site, shards in old.items():
                assert Shards(config.out / site.folder).identity == shards.identity
    assert tree(config.out) == tree(config.out.parent / "undisturbed")


def test_an_unfinished_harvest_that_asks_for_more_has_no_seam(config, reap, model):
    def broken(sites, input_ids):
        if model.passes == 8:
            raise KeyboardInterrupt
        return model.activations(sites, input_ids)

    model.capture = broken
    with pytest.raises(KeyboardInterrupt):
        reap(config, num_tokens=FIRST)
    model.capture = model.activations
    reap(config, num_tokens=1900)
    reap(config, num_tokens=1900, out=config.out.parent / "undisturbed")
    assert tree(config.out) == tree(config.out.parent / "undisturbed")


def test_a_text_that_has_ended_adds_nothing_and_changes_nothing(config, reap, model, capsys):
    whole = reap(config)
    before = tree(config.out)
    assert reap(config, num_tokens=2 * 10**6) == whole
    assert "text ends" in capsys.readouterr().err
    assert tree(config.out) == before
    assert model.loads == 1


def changed(corpus):
    """One document with other words, as long as before."""
    path = corpus / "07.txt"
    path.write_text(path.read_text().replace("return x + 0", "return x - 0"))


def test_growing_over_text_that_changed_is_refused_and_nothing_is_written(config, reap, corpus, model):
    reap(config, num_tokens=FIRST)
    before, loads = tree(config.out), model.loads
    changed(corpus)
    with pytest.raises(
        ConfigError, match=rf"the text \({corpus}\) has changed since this harvest began: parents\.text is '\w+' there"
    ):
        reap(config, num_tokens=1900)
    assert tree(config.out) == before
    assert model.loads == loads


def test_a_finished_harvest_outlives_its_text(config, reap, corpus, capsys):
    whole, before = reap(config, num_tokens=FIRST), tree(config.out)
    changed(corpus)
    assert reap(config, num_tokens=FIRST) == whole
    assert f"{corpus} has changed since it was harvested" in capsys.readouterr().err
    shutil.rmtree(corpus)
    assert reap(config, num_tokens=FIRST) == whole
    with pytest.raises(TextError, match="no such file or folder"):
        reap(config, num_tokens=1900)
    assert tree(config.out) == before


def test_an_interrupted_harvest_goes_on_only_over_the_same_text(config, reap, corpus, model):
    def broken(sites, input_ids):
        if model.passes == 9:
            raise KeyboardInterrupt
        return model.activations(sites, input_ids)

    model.capture = broken
    with pytest.raises(KeyboardInterrupt):
        reap(config)
    model.capture = model.activations
    (corpus / "40.txt").write_text("one more document")
    with pytest.raises(ConfigError, match=r"parents\.text"):
        reap(config)
    (corpus / "40.txt").unlink()
    reap(config)
    reap(config, out=config.out.parent / "undisturbed")
    assert tree(config.out) == tree(config.out.parent / "undisturbed")


def test_a_folder_of_before_texts_had_identities_may_grow(config, reap):
    reap(config, num_tokens=FIRST)
    owner = json.loads((config.out / "harvest.json").read_text())
    del owner["parents"]["text"]
    (config.out / "harvest.json").write_text(json.dumps(owner))
    assert reap(config, num_tokens=1900).num_rows == 1900


def test_shards_of_the_library_have_the_identity_they_always_had(config, reap):
    text = TextConfig(source="arithmetic", context=32)
    result = reap(config, text=text, num_tokens=600)
    assert read_manifest(result.folders[SITE]).parents == {"model": "stand-in"}
    owner = json.loads((config.out / "harvest.json").read_text())
    assert owner["parents"] == {"model": "stand-in", "text": text_identity(text)}
    assert "bos" not in owner["config"]["text"], "fields that came later are left out at their defaults"


def test_fewer_rows_than_there_are_is_another_harvest(config, reap):
    reap(config, num_tokens=FIRST)
    with pytest.raises(ConfigError, match="num_tokens is 1300 there and 1200 here"):
        reap(config, num_tokens=1200)


def test_a_lost_owner_is_known_by_the_manifests(config, reap):
    reap(config, num_tokens=FIRST)
    before = tree(config.out)
    (config.out / "harvest.json").unlink()
    with pytest.raises(ConfigError, match="seed is 0 there and 3 here"):
        reap(config, num_tokens=FIRST, seed=3)
    reap(config, num_tokens=1900)
    (config.out / "harvest.json").unlink()
    with pytest.raises(ConfigError, match=r"harvest\.json: is missing"):
        reap(config, num_tokens=1900)
    assert before.items() & tree(config.out).items()


def size(folder) -> int:
    return sum(len(data) for data in tree(folder).values())


@pytest.mark.parametrize("share", [0.35, 0.5, 0.77, 0.9, 1.5])
def test_a_budget_ends_in_a_whole_folder_that_keeps_to_it(config, reap, share, capsys):
    reap(config, out=config.out.parent / "whole")
    all_bytes = size(config.out.parent / "whole")
    budget = int(share * all_bytes)
    capsys.readouterr()
    result = reap(config, max_bytes=budget)
    said = capsys.readouterr().err
    verify_shards(config.out)
    assert size(config.out) <= budget
    assert reap(config, max_bytes=budget) == result
    if share > 1:
        assert "is used up" not in said
        assert shard_bytes(config.out) == shard_bytes(config.out.parent / "whole")
    else:
        assert f"max_bytes={budget} is used up after {result.num_rows} of 1000000 tokens" in said
        assert 0 < result.num_rows < read_manifest(config.out.parent / "whole" / SITE.folder).num_rows


@pytest.mark.parametrize("count", [2, 3])
def test_partitions_keep_to_one_budget(config, reap, count):
    reap(config, out=config.out.parent / "one", max_bytes=100_000)
    for index in range(count):
        reap(config, max_bytes=100_000, partition=(index, count))
    assert tree(config.out) == tree(config.out.parent / "one")


def test_a_larger_budget_goes_on(config, reap):
    small = reap(config, max_bytes=90_000)
    old = shard_bytes(config.out)
    grown = reap(config, max_bytes=150_000)
    assert small.num_rows < grown.num_rows
    assert old.items() <= shard_bytes(config.out).items()
    assert size(config.out) <= 150_000
    whole = reap(config)
    assert whole.num_rows > grown.num_rows
    before = tree(config.out)
    assert reap(config, max_bytes=1000) == whole  # what is whole is not taken away
    assert tree(config.out) == before
    verify_shards(config.out)


def test_a_budget_for_less_than_a_block_is_refused(config, reap, model):
    with pytest.raises(StorageError, match="max_bytes=5000 holds not even one block of 32 tokens at 3 sites"):
        reap(config, max_bytes=5000)
    assert model.loads == 0
    assert not config.out.exists()


def test_a_budget_may_end_a_harvest_that_was_interrupted(config, reap, model):
    def broken(sites, input_ids):
        if model.passes == 14:
            raise KeyboardInterrupt
        return model.activations(sites, input_ids)

    model.capture = broken
    with pytest.raises(KeyboardInterrupt):
        reap(config)
    model.capture = model.activations
    reap(config, max_bytes=265_000)
    reap(config, max_bytes=265_000, out=config.out.parent / "undisturbed")
    assert tree(config.out) == tree(config.out.parent / "undisturbed")
