"""Sparse codes are the dense ones, row by row, for any number of SAEs in one pass."""

import pytest
import torch
from small_scope import build_scope

from everyscope.evaluate.comparisons.splitting import codes_of
from everyscope.evaluate.held_out import ranges_of, read_held_out
from everyscope.evaluate.passes import clean_pass
from everyscope.evaluate.targets import load_targets
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site


def test_codes_are_those_of_the_clean_activations(tmp_path, monkeypatch: pytest.MonkeyPatch):
    config = build_scope(tmp_path, (Site("attn_out", 1), Site("resid_post", 0)))
    targets, model = load_targets(config), load_language_model(config.model).model
    monkeypatch.setattr("everyscope.evaluate.comparisons.splitting.CHUNK_ACTIVATIONS", 32 * 17)
    held_out = read_held_out(config.model_copy(update={"num_sequences": 10}))
    batches = held_out.batches(ranges_of(10, (10, config.batch_blocks)), torch.device("cpu"))
    total = 0
    for batch, codes in zip(batches, codes_of(config, targets, 10), strict=True):
        with torch.no_grad():
            clean = clean_pass(model, [target.site for target in targets], batch)
        assert set(codes) == {target.identity for target in targets}
        for target in targets:
            found, dense = codes[target.identity], target.sae().encode(clean.activations[target.site][batch.mask])
            rebuilt = torch.zeros_like(dense)
            rebuilt[found.row, found.latent] = found.value
            assert torch.allclose(rebuilt, dense, atol=1e-6)
            assert found.num_rows == len(dense)
            total += len(found.row)
    assert total > 0
