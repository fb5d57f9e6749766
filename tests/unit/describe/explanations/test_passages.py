import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from everyscope.base.errors import DataError
from everyscope.describe.explanations.firings import collect_firings
from everyscope.describe.explanations.passages import CHECK, LEARN, SCORE, Passages, cut_windows, join_blocks
from everyscope.describe.explanations.run import text_pieces
from everyscope.sae.folded import Sae
from everyscope.sae.normalisation import NormLimits
from everyscope.sites.capture import capture
from everyscope.sites.config import ModelConfig
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.text.blocks import Block, Cursor, pack
from everyscope.text.config import TextConfig
from everyscope.text.documents import Document


def blocks_of(tokenizer: Any, *texts: str) -> list[Block]:
    return list(pack([Document("", text, text) for text in texts], TextConfig(context=16), tokenizer, Cursor()))


def test_parts_share_no_document(passages: Passages):
    documents = {part: set(passages.document.ravel()[passages.tokens_of(part)].tolist()) for part in (LEARN, CHECK, SCORE)}
    assert all(documents.values())
    assert not documents[LEARN] & documents[CHECK]
    assert not (documents[LEARN] | documents[CHECK]) & documents[SCORE]


def test_halves_are_about_equal(passages: Passages):
    learn, check = len(passages.tokens_of(LEARN)), len(passages.tokens_of(CHECK))
    assert 0.8 < learn / check < 1.25


def test_uncounted_tokens_have_no_part(passages: Passages):
    every = np.concatenate([passages.tokens_of(part) for part in (LEARN, CHECK, SCORE)])
    assert np.array_equal(np.sort(every), np.flatnonzero(passages.mask.ravel()))


def test_windows_lie_in_one_document_of_one_block(passages: Passages):
    for part in (LEARN, CHECK, SCORE):
        windows, seen = cut_windows(passages, (part,), 16), np.zeros(passages.input_ids.size, int)
        for number in range(len(windows)):
            tokens = windows.tokens(number)
            seen[tokens] += 1
            assert 8 <= len(tokens) <= 16
            assert set(passages.document.ravel()[tokens]) == {windows.document[number]}
            assert len(set(tokens // passages.input_ids.shape[1])) == 1
            assert (passages.part[tokens] == part).all()
            assert (windows.of_token[tokens] == number).all()
        assert seen.max() == 1
        assert np.array_equal(np.flatnonzero(seen), windows.inside)
        assert len(windows.inside) > 0.8 * (passages.part == part).sum()


def test_one_training_document_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="shows 1 document"):
        join_blocks(blocks_of(tokenizer, "x = 1\n" * 30), blocks_of(tokenizer, "y = 2\n"), seed=0)


def test_pieces_spell_the_text_and_frames_are_empty(tokenizer: Any):
    text = "def über(x):\n\treturn '😀 «naïve»'  # \u202e\n"
    pieces = text_pieces(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[number] for number in ids) == text.encode()
    assert pieces[tokenizer.bos_token_id] == pieces[tokenizer.eos_token_id] == b""


def test_massive_rows_have_no_firings(passages: Passages):
    model = load_language_model(ModelConfig()).model
    some, site = replace(passages, input_ids=passages.input_ids[:2], mask=passages.mask[:2]), Site("resid_post", 1)
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(128, 32, generator=generator)
    sae = Sae(W_enc, W_enc.T.contiguous(), torch.zeros(32), torch.zeros(128), torch.full((32,), 0.1))
    rows = capture(model, [site], torch.from_numpy(some.input_ids).long())[site].reshape(-1, 128)
    norms = rows[torch.from_numpy(some.mask.ravel())].norm(dim=1).sort().values
    limit = float(norms[len(norms) // 2 :][:2].mean())  # between two rows, not at one
    usual = set(np.flatnonzero(some.mask.ravel() & (rows.norm(dim=1).numpy() <= limit)).tolist())
    every, kept = collect_firings(
        model, [(site, sae, NormLimits(one, one)) for one in (math.inf, limit)], some, 2, lambda blocks: None
    )
    assert 0 < len(usual) < int(some.mask.sum())
    assert set(kept.tokens.tolist()) <= usual < set(every.tokens.tolist())
    for latent in range(32):
        tokens, activations = every.of(latent)
        is_usual = np.isin(tokens, list(usual))
        np.testing.assert_array_equal(kept.of(latent)[0], tokens[is_usual])
        np.testing.assert_array_equal(kept.of(latent)[1], activations[is_usual])


def test_a_transcoder_has_no_firings_where_either_side_is_massive(passages: Passages):
    model = load_language_model(ModelConfig()).model
    some, site = replace(passages, input_ids=passages.input_ids[:2], mask=passages.mask[:2]), Site("transcoder", 1)
    reads, writes = site.inputs[0], site.outputs[0]
    found = capture(model, [reads, writes], torch.from_numpy(some.input_ids).long())
    read, written = (found[place].reshape(-1, found[place].shape[-1]).norm(dim=1).numpy() for place in (reads, writes))
    limits = [float(np.quantile(norms[some.mask.ravel()], 0.7)) for norms in (read, written)]
    d_in, d_out = found[reads].shape[-1], found[writes].shape[-1]
    always = Sae(torch.zeros(d_in, 1), torch.ones(1, d_out), torch.ones(1), torch.zeros(d_out), torch.full((1,), 0.1))
    (firings,) = collect_firings(model, [(site, always, NormLimits(*limits))], some, 2, lambda blocks: None)
    usual = [some.mask.ravel() & (norms <= limit) for norms, limit in zip((read, written), limits, strict=True)]
    assert (usual[0] != usual[1]).any()
    assert firings.tokens.tolist() == np.flatnonzero(usual[0] & usual[1]).tolist()
