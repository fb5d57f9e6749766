"""Every block once, in batches of any size, each row in its own group."""

import numpy as np
import pytest
import torch
from small_scope import build_scope

from everyscope.base.errors import TextError
from everyscope.evaluate import held_out
from everyscope.evaluate.held_out import ranges_of, read_held_out
from everyscope.sites.names import Site
from everyscope.text.blocks import read_blocks
from everyscope.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    return build_scope(tmp_path_factory.mktemp("scope"), (Site("resid_post", 0),))


@pytest.mark.parametrize("num_sequences", [1, 5, 8, 9, 40])
@pytest.mark.parametrize("stretches", [((0, 3),), ((4, 2),), ((8, 16),), ((5, 2), (7, 1))])
def test_ranges_cover_every_block_once(num_sequences: int, stretches: tuple):
    ranges = ranges_of(num_sequences, *stretches, (num_sequences, 6))
    assert [block for blocks in ranges for block in blocks] == list(range(num_sequences))
    assert all(len(blocks) <= max(size for _, size in (*stretches, (0, 6))) for blocks in ranges)
    assert not any(blocks.start < end < blocks.stop for blocks in ranges for end, _ in stretches)


def test_groups_are_those_of_the_blocks(config):
    found = read_held_out(config)
    batches = list(found.batches(ranges_of(found.num_sequences, (found.num_sequences, 3)), torch.device("cpu")))
    assert sum(len(batch.input_ids) for batch in batches) == found.num_sequences
    positions = np.concatenate([batch.row_groups["position"] for batch in batches])
    assert positions.tolist() == np.nonzero(found.mask)[1].tolist()
    units = np.concatenate([batch.row_groups["document"] for batch in batches])
    assert units.tolist() == found.units[found.mask].tolist()
    assert len(set(units.tolist())) == found.num_documents
    for batch in batches:
        counts = batch.mask[:, :-1] & batch.mask[:, 1:]
        assert {len(index) for index in batch.loss_groups.values()} == {int(counts.sum())}


def test_documents_are_the_units_until_there_are_too_many(config, monkeypatch: pytest.MonkeyPatch):
    apart = read_held_out(config)
    assert apart.sizes["document"] == apart.num_documents > 10
    monkeypatch.setattr(held_out, "MAX_UNITS", 6)
    pooled = read_held_out(config)
    assert (pooled.sizes["document"], pooled.num_documents) == (6, apart.num_documents)
    for unit in range(apart.num_documents):
        assert len(set(pooled.units[apart.mask & (apart.units == unit)])) == 1


def test_a_stride_reads_every_so_many_blocks(config):
    blocks = list(read_blocks(config.text, load_tokenizer(config.model.name), "held_out"))
    found = read_held_out(config.model_copy(update={"stride": 3, "num_sequences": 5}))
    assert np.array_equal(found.input_ids, np.stack([block.input_ids for block in blocks[::3][:5]]))


def test_text_without_held_out_documents_is_refused(config, tmp_path):
    (tmp_path / "one.txt").write_text("a single document that is in the training split or out of it")
    for fraction in (1e-9, 1 - 1e-9):
        text = config.text.model_copy(update={"paths": (tmp_path,), "held_out_fraction": fraction})
        if fraction < 0.5:
            with pytest.raises(TextError, match="none of its 1 documents is held_out"):
                read_held_out(config.model_copy(update={"text": text}))
        else:
            assert read_held_out(config.model_copy(update={"text": text})).num_documents == 1
