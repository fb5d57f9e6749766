"""examples.safetensors of Gemma Scope 2: written as the release has it, read latent by latent, and held against the coder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from everyscope.base.errors import ConfigError, DataError, ShapeMismatch
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capture
from everyscope.sites.model import load_language_model
from everyscope.sites.names import Site
from everyscope.suite.formats.gemma_scope_2_examples import EXAMPLES_FILE, disagreement, read_examples

WIDTH, NUMBER, SEQUENCES, CTX = 12, 30, 5, 16


@pytest.fixture(scope="module")
def language(tiny_random_model_folder):
    return load_language_model(str(tiny_random_model_folder))


def coder_of(d: int) -> Sae:
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec, b_enc, b_dec = (torch.randn(*shape, generator=g) / d**0.5 for shape in ((d, WIDTH), (WIDTH, d), (WIDTH,), (d,)))
    metadata = SaeMetadata(Site("mlp_in", 1), target=Site("mlp_out", 1), convention="mlp_input")
    return Sae(W_enc, W_dec, b_enc, b_dec, torch.full((WIDTH,), 0.3), metadata=metadata)


@torch.no_grad()
def write(folder: Path, language, coder: Sae) -> torch.Tensor:
    """The file as DeepMind's: places of 1,000 in ours NUMBER, the rest zero. Activations [sequences, ctx, latents]."""
    tokens = torch.randint(3, 60, (SEQUENCES, CTX), generator=torch.Generator().manual_seed(1))
    f = coder.encode(capture(language, "mlp_in.1", tokens).float())
    largest, places = f.flatten(0, 1).T.topk(NUMBER, dim=1)
    shuffled = torch.randperm(NUMBER, generator=torch.Generator().manual_seed(2))
    largest, places = largest[:, shuffled].contiguous(), places[:, shuffled]
    save_file(
        {
            "activations": largest,
            "positions": (places % CTX).int(),
            "seq_ids": (places // CTX).contiguous(),
            "tokens": tokens.int(),
            "logit_effects": largest * 0.5,
            **{f"{side}_logits": torch.arange(WIDTH * 10.0).view(WIDTH, 10) for side in ("top", "bottom")},
            **{f"{side}_tokens": torch.arange(WIDTH * 10).view(WIDTH, 10).int() for side in ("top", "bottom")},
            "feature_frequencies": (f > 0).flatten(0, 1).double().mean(0),
        },
        folder / EXAMPLES_FILE,
    )
    return f


def test_each_latents_examples_are_those_of_the_file_strongest_first(tmp_path, language):
    f = write(tmp_path, language, coder_of(language.adapter.d_model))
    for latent in range(WIDTH):
        found = read_examples(tmp_path, latent)
        own = f[..., latent].flatten()
        assert found.frequency == pytest.approx(float((own > 0).float().mean()))
        torch.testing.assert_close(found.activations, own[own > 0].sort(descending=True).values[:NUMBER])
        torch.testing.assert_close(found.logit_effects, found.activations * 0.5)
        assert found.sequences.shape == (len(found.activations), CTX)
        assert found.top[10 * latent + 3] == 10.0 * latent + 3


def test_they_agree_with_the_coder_and_not_with_another(tmp_path, language):
    coder = coder_of(language.adapter.d_model)
    write(tmp_path, language, coder)
    examples = read_examples(tmp_path, 4)
    assert len(examples.activations) > 3
    assert disagreement(examples, coder, language) < 1e-5
    gain = torch.linspace(0.2, 3, coder.d_in)
    misread = to_convention(replace_convention(coder, "normalised"), "mlp_input", gain)  # as if a gain were to be folded in
    assert disagreement(examples, misread, language) > 0.1
    elsewhere = coder.with_tensors(replace(coder.metadata, site=Site("mlp_in", 0), target=Site("mlp_out", 0)))
    assert disagreement(examples, elsewhere, language) > 0.1
    with pytest.raises(ConfigError, match="take the gain"):
        disagreement(examples, replace_convention(coder, "normalised"), language)


def replace_convention(coder: Sae, convention) -> Sae:
    return coder.with_tensors(replace(coder.metadata, convention=convention))


def test_what_does_not_fit_is_refused(tmp_path, language):
    with pytest.raises(DataError, match=EXAMPLES_FILE):
        read_examples(tmp_path, 0)
    write(tmp_path, language, coder_of(language.adapter.d_model))
    with pytest.raises(ConfigError, match="it has 0 to 11"):
        read_examples(tmp_path, WIDTH)
    whole = load_file(tmp_path / EXAMPLES_FILE)
    save_file(whole | {"seq_ids": whole["seq_ids"] + SEQUENCES}, tmp_path / EXAMPLES_FILE)
    with pytest.raises(ShapeMismatch, match="beyond tokens"):
        read_examples(tmp_path, 0)
    save_file(whole | {"positions": whole["positions"][:, 1:].contiguous()}, tmp_path / EXAMPLES_FILE)
    with pytest.raises(ShapeMismatch, match="positions has shape"):
        read_examples(tmp_path, 0)
    del whole["top_logits"]
    save_file(whole, tmp_path / EXAMPLES_FILE)
    with pytest.raises(ShapeMismatch, match="no tensor top_logits"):
        read_examples(tmp_path, 0)
