"""Splicing in an evaluation: what is replaced, what it costs, and that short cuts change nothing."""

import pytest
import torch
from small_scope import SITES, identity_sae, tiny_gemma
from torch.testing import assert_close

from everyscope.evaluate.losses import LossSums, next_token_losses
from everyscope.evaluate.passes import spliced_logits
from everyscope.sites.capture import capturing
from everyscope.sites.names import Site
from everyscope.sites.splice import splice

INPUT_IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
INPUT_IDS[:, 0] = 2
MASK = INPUT_IDS != 2
MASK[1, 4:6] = False


def clean_pass(model):
    with torch.no_grad(), capturing(model, SITES) as activations:
        logits = model(input_ids=INPUT_IDS, use_cache=False).logits
    return logits, dict(activations)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_an_identity_sae_costs_exactly_nothing(site: Site):
    model = tiny_gemma(64)
    clean, activations = clean_pass(model)
    rows = activations[site][MASK]
    spliced = spliced_logits(model, INPUT_IDS, site, identity_sae(rows.shape[-1])(rows), MASK, activations)
    losses = LossSums.start(), LossSums.start()
    losses[0].update(next_token_losses(clean, INPUT_IDS, MASK))
    losses[1].update(next_token_losses(spliced, INPUT_IDS, MASK))
    assert losses[1].mean - losses[0].mean == 0


@pytest.mark.parametrize("site", SITES, ids=str)
def test_starting_at_the_site_equals_a_full_pass(site: Site):
    model = tiny_gemma(64)
    clean, activations = clean_pass(model)
    rows = torch.randn_like(activations[site][MASK])
    whole = torch.zeros_like(activations[site])
    whole[MASK] = rows
    with torch.no_grad(), splice(model, {site: lambda _: whole}, mask=MASK):
        want = model(input_ids=INPUT_IDS, use_cache=False).logits
    got = spliced_logits(model, INPUT_IDS, site, rows, MASK, activations)
    assert_close(got, want)
    assert not torch.equal(got, clean)


def test_a_position_counts_if_it_and_its_target_are_unmasked():
    logits = torch.randn(2, 4, 8)
    input_ids = torch.randint(0, 8, (2, 4))
    mask = torch.tensor([[False, True, True, True], [True, True, False, True]])
    log_probabilities = logits.log_softmax(-1)
    want = [-log_probabilities[block, t, input_ids[block, t + 1]] for block, t in ((0, 1), (0, 2), (1, 0))]
    assert_close(next_token_losses(logits, input_ids, mask), torch.stack(want))


def test_losses_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch):
    logits, input_ids = torch.randn(3, 10, 64), INPUT_IDS
    whole = next_token_losses(logits, input_ids, MASK)
    monkeypatch.setattr("everyscope.evaluate.losses.CHUNK_LOGITS", 3 * 64)
    assert_close(next_token_losses(logits, input_ids, MASK), whole, rtol=0, atol=0)
