"""A transcoder in the MLP's place: of what the MLP reads in this very pass, its latents seen and changed, its error kept."""

import pytest
import torch

from everyscope.base.errors import ConfigError
from everyscope.sae.conventions import to_convention
from everyscope.sae.folded import Sae
from everyscope.sae.metadata import SaeMetadata
from everyscope.sites.capture import capture, capturing
from everyscope.sites.names import Site
from everyscope.sites.splice import splice

D, WIDTH = 32, 48


def transcoder_at(layer: int, *, has_skip: bool = True, seed: int = 0) -> Sae:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g) / D**0.5

    tensors = (draw(D, WIDTH), draw(WIDTH, D), draw(WIDTH), draw(D), draw(WIDTH).abs())
    metadata = SaeMetadata(Site("mlp_in", layer), target=Site("mlp_out", layer), convention="mlp_input")
    return Sae(*tensors, draw(D, D) if has_skip else None, metadata=metadata)


@torch.no_grad()
def test_it_stands_for_the_mlp(gemma2, input_ids, run):
    """What a hand-written pass gives, whose MLP module is replaced, and so also its post-norm's output."""
    coder, mask = transcoder_at(1), torch.ones_like(input_ids, dtype=torch.bool)
    with splice(gemma2, {"transcoder.1": coder}, mask=mask):
        got = run(gemma2, input_ids)
    norm = gemma2.model.layers[1].post_feedforward_layernorm
    read = []
    handles = [
        gemma2.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: read.append(args[0])),
        norm.register_forward_hook(lambda module, args, output: coder(read.pop())),
    ]
    want = run(gemma2, input_ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, run(gemma2, input_ids))


@torch.no_grad()
def test_one_of_the_residual_stream_reads_that_stream(gemma2, input_ids, run):
    coder = transcoder_at(1)
    coder.metadata = SaeMetadata(Site("resid_mid", 1), target=Site("mlp_out", 1), convention="residual")
    with splice(gemma2, coder), capturing(gemma2, ["resid_mid.1", "mlp_out.1", "resid_post.1"]) as seen:
        run(gemma2, input_ids)
    mask = ~torch.isin(input_ids, torch.tensor([0, 1, 2]))
    want = coder(seen["resid_mid.1"])[mask]
    torch.testing.assert_close(seen["mlp_out.1"][mask], want)
    torch.testing.assert_close(seen["resid_post.1"][mask], seen["resid_mid.1"][mask] + want)
    with pytest.raises(ConfigError, match="splice it at resid_transcoder"), splice(gemma2, {"transcoder.1": coder}):
        run(gemma2, input_ids)


@torch.no_grad()
@pytest.mark.parametrize("has_skip", [False, True])
def test_every_layers_transcoder_reads_what_the_spliced_layers_before_it_made(gemma2, input_ids, run, has_skip):
    coders = {Site("transcoder", layer): transcoder_at(layer, has_skip=has_skip, seed=layer) for layer in range(3)}
    clean = capture(gemma2, ["mlp_in.2"], input_ids)["mlp_in.2"]
    with splice(gemma2, coders) as spliced, capturing(gemma2, ["mlp_in.2", "mlp_out.2"]) as seen:
        run(gemma2, input_ids)
    assert not torch.allclose(seen["mlp_in.2"], clean)
    mask = ~torch.isin(input_ids, torch.tensor([0, 1, 2]))
    want = coders[Site("transcoder", 2)](seen["mlp_in.2"])
    torch.testing.assert_close(seen["mlp_out.2"][mask], want[mask])
    torch.testing.assert_close(spliced.latents["transcoder.2"], coders[Site("transcoder", 2)].encode(seen["mlp_in.2"]))


@torch.no_grad()
def test_with_its_error_kept_nothing_changes_and_an_edit_moves_by_its_direction(gemma2, input_ids, run):
    coder, clean = transcoder_at(1), run(gemma2, input_ids)
    with splice(gemma2, coder, keep_error=True):
        assert torch.equal(run(gemma2, input_ids), clean)

    def push(f: torch.Tensor) -> torch.Tensor:
        return f.index_add(-1, torch.tensor([5]), torch.full((*f.shape[:-1], 1), 2.0))

    before = capture(gemma2, "mlp_out.1", input_ids)
    with splice(gemma2, coder, keep_error=True, edit_latents=push), capturing(gemma2, "mlp_out.1") as seen:
        run(gemma2, input_ids)
    mask = ~torch.isin(input_ids, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(
        (seen["mlp_out.1"] - before)[mask], (2.0 * coder.W_dec[5]).expand(int(mask.sum()), D), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_any_function_of_both_places_may_stand_there(gemma2, input_ids, run):
    with splice(gemma2, {"transcoder.1": lambda read, written: written}):
        assert torch.equal(run(gemma2, input_ids), run(gemma2, input_ids))
    with splice(gemma2, {"transcoder.1": lambda read, written: 0 * written}), capturing(gemma2, "mlp_out.1") as seen:
        run(gemma2, input_ids)
    mask = ~torch.isin(input_ids, torch.tensor([0, 1, 2]))
    assert not seen["mlp_out.1"][mask].any()


def test_an_input_without_the_gain_is_refused(gemma2):
    coder = to_convention(transcoder_at(1), "normalised", torch.ones(D))
    with pytest.raises(ConfigError, match="to_convention"), splice(gemma2, coder):
        pass
