"""What counts for the loss, and that divergences are what they are called."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everyscope.base.errors import NonFinite
from everyscope.evaluate import loss_kernels
from everyscope.evaluate.losses import (
    Predictions,
    by_torch,
    counted_positions,
    kl_divergence,
    losses_and_divergences,
    next_token_losses,
)

INPUT_IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
INPUT_IDS[:, 0] = 2
MASK = INPUT_IDS != 2
MASK[1, 4:6] = False


def logits(seed: int, vocab: int = 64) -> torch.Tensor:
    return 3 * torch.randn(3, 10, vocab, generator=torch.Generator().manual_seed(seed))


def test_a_position_counts_if_it_and_its_target_are_unmasked():
    some, input_ids = logits(0, 8)[:2, :4], INPUT_IDS[:2, :4] % 8
    mask = torch.tensor([[False, True, True, True], [True, True, False, True]])
    log_probabilities = some.log_softmax(-1)
    want = [-log_probabilities[block, t, input_ids[block, t + 1]] for block, t in ((0, 1), (0, 2), (1, 0))]
    assert_close(next_token_losses(some, input_ids, mask), torch.stack(want))
    assert torch.stack(counted_positions(mask)).T.tolist() == [[0, 1], [0, 2], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [2, 63, 64, loss_kernels.BLOCK - 1, 2 * loss_kernels.BLOCK + 17])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kernels_give_what_float64_gives(vocab: int, scale: float, dtype: torch.dtype):
    """To a few roundings of the log-probabilities, which are below 2^8 here; float32's own are 2^-24 of them."""
    clean = logits(1, vocab).to(dtype)
    ours, input_ids = (clean + scale * logits(2, vocab)).to(dtype), INPUT_IDS % vocab
    losses, divergences = losses_and_divergences(ours, Predictions.of(clean), input_ids, MASK)
    log_p, log_q = clean.double().log_softmax(-1), ours.double().log_softmax(-1)
    block, position = counted_positions(MASK)
    want = -log_q[block, position].gather(1, input_ids[block, position + 1, None])[:, 0]
    assert_close(losses.double(), want, rtol=1e-6, atol=2e-6)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)[block, position]
    assert_close(divergences.double(), want, rtol=1e-5, atol=1e-7)
    assert_close(next_token_losses(ours, input_ids, MASK), losses, rtol=0, atol=0)


def test_other_devices_give_the_same_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch):
    found = losses_and_divergences(logits(0), Predictions.of(logits(1)), INPUT_IDS, MASK)
    whole = by_torch(logits(0), logits(1), INPUT_IDS, MASK)
    monkeypatch.setattr("everyscope.evaluate.losses.CHUNK_LOGITS", 3 * 64)
    for got, want, kernels in zip(by_torch(logits(0), logits(1), INPUT_IDS, MASK), whole, found, strict=True):
        assert_close(got, want, rtol=0, atol=0)
        assert_close(kernels, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_losses_depend_neither_on_threads_nor_on_other_rows(threads: int):
    want = losses_and_divergences(logits(0), Predictions.of(logits(1)), INPUT_IDS, MASK)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for block in range(3):
            some = slice(block, block + 1)
            got = losses_and_divergences(logits(0)[some], Predictions.of(logits(1)[some]), INPUT_IDS[some], MASK[some])
            in_block = counted_positions(MASK)[0] == block
            for one, whole in zip(got, want, strict=True):
                assert_close(one, whole[in_block], rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


def test_the_exponential_is_right_to_two_units_in_the_last_place():
    less = -np.concatenate([np.linspace(0, 87, 200_001), np.geomspace(1e-30, 1, 1000)]).astype(np.float32)
    sums = np.array(
        [loss_kernels.sum_exponentials(less[place : place + 1].copy(), np.float32(0)) for place in range(0, len(less), 7)]
    )
    assert np.abs(sums / np.exp(less[::7].astype(np.float64)) - 1).max() < 2 * 2.0**-23


def test_divergence_of_two_coins():
    """KL((1/2, 1/2) || (1/4, 3/4)) = log 2 - log 3 / 2."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(float(torch.tensor(2.0).log() - torch.tensor(3.0).log() / 2), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 30.0])
def test_divergence_is_never_negative_and_exact(scale: float):
    """In float32, to 1e-5 of its value where that is above rounding, against float64."""
    clean = logits(1, 512)
    other = clean + scale * logits(2, 512)
    got = kl_divergence(clean.log_softmax(-1), other.log_softmax(-1))
    log_p, log_q = clean.double().log_softmax(-1), other.double().log_softmax(-1)
    want = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (got >= 0).all()
    assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_equal_predictions_diverge_by_exactly_nothing():
    _, divergences = losses_and_divergences(logits(0), Predictions.of(logits(0)), INPUT_IDS, MASK)
    assert (divergences == 0).all()
    assert len(divergences) == len(counted_positions(MASK)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_refused_with_the_name_of_who_made_them(bad: float):
    broken = logits(0)
    broken[2, 7, 5] = bad
    with pytest.raises(NonFinite, match="a tired model: logits are NaN or infinite"):
        next_token_losses(broken, INPUT_IDS, MASK, "a tired model")
    with pytest.raises(NonFinite, match="spliced in"):
        losses_and_divergences(broken, Predictions.of(logits(0)), INPUT_IDS, MASK, "w32 spliced in")


def test_nothing_counts_where_all_is_masked():
    losses, divergences = losses_and_divergences(logits(0), Predictions.of(logits(1)), INPUT_IDS, torch.zeros_like(MASK))
    assert len(losses) == len(divergences) == len(next_token_losses(logits(0), INPUT_IDS, torch.zeros_like(MASK))) == 0


def test_saelens_counts_predictions_of_masked_tokens_and_we_do_not():
    """sae-lens 6.54 (evals.py) masks the loss by the input token alone: there the prediction of EOS counts, here not.

    Its mean is ours with those positions put back; benchmarks/agreement.py compares both packages so.
    """
    every = -logits(0)[:, :-1].log_softmax(-1).gather(2, INPUT_IDS[:, 1:, None])[..., 0]
    theirs = every[MASK[:, :-1]]
    ours = next_token_losses(logits(0), INPUT_IDS, MASK)
    onto_masked = every[MASK[:, :-1] & ~MASK[:, 1:]]
    assert len(onto_masked) == 1
    assert float(theirs.sum()) == pytest.approx(float(ours.sum() + onto_masked.sum()), rel=1e-6)
