"""Splicing in an evaluation: what is replaced, what it costs, and that short cuts change nothing."""

import pytest
import torch
from small_scope import SITES, identity_sae, tiny_gemma
from torch.testing import assert_close

from everyscope.evaluate.held_out import Batch
from everyscope.evaluate.losses import Predictions, losses_and_divergences, next_token_losses
from everyscope.evaluate.passes import clean_pass, spliced_logits
from everyscope.sites.names import Site
from everyscope.sites.splice import splice

INPUT_IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
INPUT_IDS[:, 0] = 2
MASK = INPUT_IDS != 2
MASK[1, 4:6] = False
BATCH = Batch(0, INPUT_IDS, MASK, torch.zeros_like(INPUT_IDS), torch.zeros_like(INPUT_IDS))


@torch.no_grad()
def spliced(model, site: Site, rows, clean):
    return spliced_logits(model, INPUT_IDS, site, rows, MASK, clean.activations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("site", SITES, ids=str)
def test_an_identity_sae_costs_exactly_nothing(site: Site, dtype: torch.dtype):
    model = tiny_gemma(64).to(dtype)
    clean = clean_pass(model, list(SITES), BATCH)
    rows = clean.activations[site][MASK]
    logits = spliced(model, site, identity_sae(rows.shape[-1])(rows), clean)
    losses, divergences = losses_and_divergences(logits, Predictions.of(clean.logits), INPUT_IDS, MASK)
    assert_close(losses, next_token_losses(clean.logits, INPUT_IDS, MASK), rtol=0, atol=0)
    assert (divergences == 0).all()


@pytest.mark.parametrize("site", SITES, ids=str)
def test_starting_at_the_site_equals_a_full_pass(site: Site):
    model = tiny_gemma(64)
    clean = clean_pass(model, list(SITES), BATCH)
    rows = torch.randn_like(clean.activations[site][MASK])
    whole = torch.zeros_like(clean.activations[site])
    whole[MASK] = rows
    with torch.no_grad(), splice(model, {site: lambda _: whole}, mask=MASK):
        want = model(input_ids=INPUT_IDS, use_cache=False).logits
    got = spliced(model, site, rows, clean)
    assert_close(got, want)
    assert not torch.equal(got, clean.logits)
    _, divergences = losses_and_divergences(got, Predictions.of(clean.logits), INPUT_IDS, MASK)
    assert (divergences > 0).any()
