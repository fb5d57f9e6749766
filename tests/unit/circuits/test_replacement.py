"""The local replacement model: its sums, its logits, and its gradients, in every family."""

import copy

import pytest
import torch
from random_transcoders import transcoder
from torch import Tensor

from everyscope.base.errors import ConfigError
from everyscope.circuits.attribution import counted_tokens
from everyscope.circuits.frozen import FrozenModel
from everyscope.circuits.replacement import LocalReplacement
from everyscope.sae.folded import Sae
from everyscope.sites.registry import adapter_of

D_MODEL, WIDTH, LAYERS = 32, 48, 3
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-10}
SKIPS = {"skips": (True, True, True), "no skips": (False, False, False), "one layer without": (True, None, False)}
"""Whether each layer's transcoder has a skip; None: the layer has no transcoder."""


def replacement_of(model, prompt: Tensor, dtype=torch.float32, skips=SKIPS["skips"], conventions=("mlp_input",) * 3):
    model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    coders = {
        layer: transcoder(layer, D_MODEL, WIDTH, has_skip=has_skip, convention=conventions[layer])
        for layer, has_skip in enumerate(skips)
        if has_skip is not None
    }
    return LocalReplacement(FrozenModel(model, adapter_of(model), prompt), coders, counted_tokens(model, prompt[0]))


def all_rows(replacement: LocalReplacement):
    rows = replacement.frozen.unembedding.to(replacement.frozen.embed)
    directions = [replacement.direction(rows[token] - rows.mean(0)) for token in (3, 20)]
    return replacement.rows(torch.arange(replacement.num_latents), directions)


@pytest.mark.parametrize("skips", SKIPS.values(), ids=SKIPS)
def test_what_nodes_send_and_biases_make_each_nodes_value(model, family, prompt, dtype, skips):
    conventions = ("mlp_input", "residual", "mlp_input" if family == "olmo2" else "normalised")
    rows = all_rows(replacement_of(model, prompt, dtype, skips, conventions))
    assert rows.violation.max() < ALLOWED[dtype]
    gap = rows.weight.double().sum(1) + rows.bias.double() - rows.pre.double()
    assert gap.abs().max() < 10 * ALLOWED[dtype] * rows.pre.abs().max()
    assert rows.bias.abs().min() > 0  # b_enc at least: the law would hold without any bias too
    assert len(rows.weight) > 100


def test_with_errors_its_logits_are_the_models(model, prompt):
    replacement = replacement_of(model, prompt)
    with torch.no_grad():
        want = model(input_ids=prompt, use_cache=False).logits[0, -1]
    torch.testing.assert_close(replacement.frozen.logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(replacement.frozen.capped(replacement.logits), want, rtol=0, atol=1e-4)


def test_latents_are_those_of_the_clean_pass(gemma2, prompt):
    replacement = replacement_of(gemma2, prompt)
    coder, found = replacement.coders[0], replacement.layers[0]
    read, _ = replacement.frozen.run_block(
        0, replacement.frozen.embed, lambda _: replacement.frozen.added(0)[None], replacement.reads[0]
    )
    dense = torch.zeros(prompt.shape[1], WIDTH)
    dense[found.position, found.latent] = found.activation
    want = coder.encode(read[0])
    want[0] = 0  # BOS
    torch.testing.assert_close(dense, want)
    at_bos = replacement.errors[0][0]
    torch.testing.assert_close(at_bos, replacement.frozen.added(0)[0])


def test_of_a_topk_transcoder_only_its_largest_latents_are_nodes(gemma2, prompt):
    """As Sae.encode has them; the law holds for these too."""
    plain = transcoder(0, D_MODEL, WIDTH, has_skip=True)
    few = Sae(**plain.own_tensors(), metadata=plain.metadata, top_k=3)
    counted = counted_tokens(gemma2, prompt[0])
    most, fewer = (LocalReplacement(FrozenModel(gemma2, adapter_of(gemma2), prompt), {0: one}, counted) for one in (plain, few))
    per_token = torch.bincount(fewer.layers[0].position, minlength=prompt.shape[1])
    assert (per_token[counted] == 3).all()
    assert fewer.num_latents < most.num_latents
    kept = set(zip(*(part.tolist() for part in (fewer.layers[0].position, fewer.layers[0].latent)), strict=True))
    assert kept <= set(zip(*(part.tolist() for part in (most.layers[0].position, most.layers[0].latent)), strict=True))
    assert all_rows(fewer).violation.max() < ALLOWED[torch.float32]


def test_a_row_is_the_gradient_of_the_frozen_model(model, prompt):
    """Finite differences in float64: what one more latent does to a latent two layers on, through skips too."""
    replacement = replacement_of(model, prompt, torch.float64)
    source = 3
    target = replacement.starts[2] + 7
    rows = replacement.rows(torch.tensor([target]), [])
    coder, found = replacement.coders[0], replacement.layers[0]
    step = 1e-3 * found.activation[source] * coder.W_dec[found.latent[source]]

    def value(pushed: float) -> Tensor:
        stream = replacement.frozen.embed
        clean_reads = []
        for layer in range(LAYERS):

            def write(read: Tensor, layer: int = layer) -> Tensor:
                clean_reads.append(read)
                added = replacement.errors[layer] + replacement._latents_sum(layer) + replacement._without_latents(layer, read)[0]
                if layer == 0:
                    added[found.position[source]] += pushed * step
                return added[None]

            _, stream = replacement.frozen.run_block(layer, stream, write, replacement.reads[layer])
        place = target - replacement.starts[2]
        last = replacement.layers[2]
        return clean_reads[2][0, last.position[place]] @ replacement.coders[2].W_enc[:, last.latent[place]]

    with torch.no_grad():
        slope = (value(1.0) - value(-1.0)) / 2e-3
    torch.testing.assert_close(rows.weight[0, source], slope, rtol=1e-7, atol=1e-9)


def test_no_target_receives_from_later_layers_or_tokens(gemma2, prompt):
    replacement = replacement_of(gemma2, prompt)
    rows = replacement.rows(torch.arange(replacement.num_latents), [])
    layer = torch.cat([torch.full((len(found.latent),), number) for number, found in enumerate(replacement.layers)])
    position = torch.cat([found.position for found in replacement.layers])
    among = rows.weight[:, : replacement.num_latents]
    assert not among[layer[:, None] <= layer].any()
    assert not among[position[:, None] < position].any()
    assert among.any()


def test_coders_of_another_place_are_refused(gemma2, prompt):
    frozen = FrozenModel(gemma2, adapter_of(gemma2), prompt)
    counted = torch.ones(prompt.shape[1], dtype=torch.bool)
    with pytest.raises(ConfigError, match="layer 1's MLP"):
        LocalReplacement(frozen, {1: transcoder(0, D_MODEL, WIDTH)}, counted)
    with pytest.raises(ConfigError, match="d_model is 32"):
        LocalReplacement(frozen, {0: transcoder(0, 16, WIDTH)}, counted)
    with pytest.raises(ConfigError, match="one prompt"):
        FrozenModel(gemma2, adapter_of(gemma2), prompt.repeat(2, 1))
